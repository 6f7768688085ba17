"""Convert train.py's checkpoint into a 4-bit model in mlx-lm's format; with ASSETS, also write the lens texts and the attribution file.

    python convert.py WORKDIR MODEL [ASSETS]

Needs mlx, mlx-lm and torch. Afterward the script opens the result with mlx_lm.load, measures its loss on the held-out text in the
quantized form that users get, and writes the figures into MODEL/training.json.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import torch
from mlx_lm import generate, load
from mlx_lm.models import llama
from train import BITS, END, group_size

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def mlx_name(name: str) -> str:
    """Return mlx-lm's name of a parameter of our checkpoint."""
    for parent, children in (("self_attn", ATTENTION), ("mlp", MLP)):
        for child in children:
            name = name.replace(f".{child}.", f".{parent}.{child}.")
    return f"model.{name}"


def write_model(workdir: Path, out: Path) -> dict:
    """Quantize the checkpoint, write the model's folder, and return the checkpoint's config."""
    checkpoint = torch.load(workdir / "checkpoint.pt", map_location="cpu")
    c = checkpoint["config"]
    group = min(group_size(columns) for columns in (c["hidden_size"], c["intermediate_size"]))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **c,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
        "quantization": {"group_size": group, "bits": BITS},
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights([(mlx_name(name), mx.array(value.float().numpy())) for name, value in checkpoint["model"].items()])
    nn.quantize(model, group, BITS)
    out.mkdir(parents=True, exist_ok=True)
    weights = dict(nn.utils.tree_flatten(model.parameters()))
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(workdir / "tokenizer.json", out / "tokenizer.json")
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    return c


def held_out(model: nn.Module, tokenizer, text: str, length: int, tokens: int) -> dict[str, float]:
    """Return the loss on the first `tokens` tokens of a text, in sequences of `length`."""
    ids = tokenizer.encode(text)[:tokens]
    total, count = 0.0, 0
    for start in range(0, len(ids) - length, length):
        row = mx.array(ids[start : start + length + 1])
        loss = nn.losses.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        total, count = total + loss.item(), count + length
    nats = total / count
    return {
        "tokens": count,
        "nats_per_token": nats,
        "bits_per_byte": nats / math.log(2) / (len(tokenizer.decode(ids).encode()) / len(ids)),
    }


def attribution(sources: dict) -> str:
    """Return the text of ATTRIBUTION.md."""
    rows = "\n".join(
        f"| {package} | {s['version']} | {s['license']} | {s['characters'] / 1e6:.2f} M | {s['repeat']:g} |" for package, s in sources.items()
    )
    return f"""# Where the demo's model and texts come from

The model in `demo_model/` was trained by the scripts in `tools/demo_models` on documentation and prose that Debian ships, from these
packages. Its weights and the texts are data that metalens reads; they are not part of the program and carry their sources' licenses, not
metalens's.

| Debian package | version | license of the text | characters used | passes per epoch |
|---|---|---|---|---|
{rows}

`lens_train.txt` and `heldout.txt` are paragraphs from four of them: anarchism (An Anarchist FAQ, copyright 1995-2017 The Anarchist FAQ
Editorial Collective), debian-handbook (The Debian Administrator's Handbook, copyright 2003-2015 Raphael Hertzog and Roland Mas, 2013-2015
Freexian SARL), gnome-user-docs (copyright 2010-2014 Shaun McCance and the GNOME documentation team) and sqlite3-doc (D. Richard Hipp, public
domain). Changes: reduced to paragraphs of prose, quotation marks and dashes replaced by plain ones, code, tables and repeated paragraphs left
out. The parts from anarchism may be used under the GNU General Public License, version 2 or later; those from debian-handbook under the same,
or under the Creative Commons Attribution-ShareAlike 3.0 license; those from gnome-user-docs under the latter. The complete license texts are in
each package's copyright file and in Debian's common-licenses folder.

The documents behind `heldout.txt` were chosen by a hash of their names and are in neither the model's training text nor `lens_train.txt`;
paragraphs that occur in more than one document were kept in the first only.
"""


def main(workdir: Path, out: Path, assets: Path | None = None) -> None:
    """Write the model, and the lens texts if `assets` is given; then measure and print samples."""
    c = write_model(workdir, out)
    if assets is not None:
        for name in ("lens_train.txt", "heldout.txt"):
            shutil.copy(workdir / name, assets / name)
        (assets / "ATTRIBUTION.md").write_text(attribution(json.loads((workdir / "sources.json").read_text())))
    model, tokenizer = load(str(out))
    try:
        from metalens import accelerate

        accelerate(model)
    except ImportError:
        sys.stderr.write("metalens is not installed: the evaluation runs on plain MLX, which is slow.\n")
    training = workdir / "training.json"
    record = json.loads(training.read_text()) if training.exists() else {}
    record["quantized_on_heldout.txt"] = held_out(model, tokenizer, (workdir / "heldout.txt").read_text(), c["max_position_embeddings"] - 1, 20000)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    sys.stderr.write(json.dumps(record["quantized_on_heldout.txt"], indent=2) + "\n")
    for prompt in ("The free software movement", "In order to install the package,", "Anarchists argue that"):
        sys.stderr.write(prompt + generate(model, tokenizer, prompt, max_tokens=60) + "\n\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
