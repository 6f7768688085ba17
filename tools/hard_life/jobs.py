"""The commands that write files, and the folder in which they run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metalens.evaluation.results import RESULTS

OLDER, NEWER = 0, 1  # the two versions of every output
# Of a result of a sweep: its times, whether it went on after a crash, and the checksum of all.
TIMED = ("seconds", "core_seconds", "resumed", "checksum")
CAUSAL = (
    *("--data", "text0.txt", "--lens", "lens0", "--layers", "0", "--max-tokens", "32", "--max-seq-len", "16"),
    *("--fidelity-tokens", "0", "--max-evaluations", "5"),
)
STEPS = 3
LENGTH = 16


@dataclass(frozen=True)
class Job:
    """A command, and the files that it writes.

    Attributes:
        name: the command, for the page.
        arguments: function of a version that returns the arguments of `metalens`.
        files: {name of a file, for the page: its path, or a pattern of paths}. Their contents depend on the version alone.
        again: what a user adds to the arguments to go on after a crash.
        together: names of files that are of one version, or that `reading` refuses.
        reading: arguments of a command that reads these files. () = they must never be of two versions.
    """

    name: str
    arguments: Callable[[int], list[str]]
    files: dict[str, str]
    again: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()


def _train(version: int) -> list[str]:
    sizes = {"steps": STEPS, "max-seq-len": LENGTH, "tokens-per-step": 2 * LENGTH, "warm-start-tokens": 6 * LENGTH, "checkpoint-every": 1}
    settings = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    outputs = ["--out", "lens", "--metrics", "metrics.jsonl"]
    return ["train", "model", "--data", f"text{version}.txt", *outputs, "--recipe", "fast", "--seed", str(version), *settings]


JOBS = (
    Job(
        "train",
        _train,
        {
            "lens.npz": "lens.npz",
            "lens.json": "lens.json",
            "metrics.jsonl": "metrics.jsonl",
            "state.safetensors": "lens.checkpoints/step-*/state.safetensors",
            "state.json": "lens.checkpoints/step-*/state.json",
            "KEY.ids": "cache/*.ids",
            "KEY.documents": "cache/*.documents",
            "KEY.json": "cache/*.json",
        },
        ("--resume",),
        ("lens.npz", "lens.json"),
        ("lens", "model", "w1", "--lens", "lens"),
    ),
    Job(
        "eval",
        lambda version: ["eval", "model", "--data", "text0.txt", "--lens", f"lens{version}", "--logit-stats", "--out", "results"],
        {name: f"results/{name}" for name in RESULTS},
    ),
    Job(
        "lens",
        lambda version: ["lens", "model", "w1 w2 w3 w4", "--lens", f"lens{version}", "--out", "read.safetensors", "--save", "read.png"],
        {"trajectory.safetensors": "read.safetensors", "picture.png": "read.png"},
    ),
    Job(
        "lens (JSON)",
        lambda version: ["lens", "model", "w1 w2 w3 w4", "--lens", f"lens{version}", "--out", "read.json"],
        {"trajectory.json": "read.json"},
    ),
    Job(
        "view", lambda version: ["view", "model", "--lens", f"lens{version}", "--text", "w1 w2 w3", "--save", "page.html"], {"page.html": "page.html"}
    ),
    Job(
        "convert (a lens)",
        lambda version: ["convert", f"lens{version}", "upstream", "--model", f"model{version}"],
        {"params.pt": "upstream/params.pt", "config.json of a lens": "upstream/config.json"},
    ),
    Job(
        "convert (a model)",
        lambda version: ["convert", f"model{version}.gguf", "converted", "--force"],
        {name: f"converted/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")},
        together=("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
    ),
    Job(
        "analyze causal",
        # The newer basis goes on from the older one.
        lambda version: ["analyze", "causal", "model", *CAUSAL, "--directions", str(version + 1), "--out", "basis"],
        {"basis of a layer": "basis/layer-*.npz"},
    ),
    Job(
        "sweep",
        lambda version: ["sweep", f"sweep{version}.toml", "--out", "sweep"],
        {"lens.npz of a cell": "sweep/lenses/*/lens.npz", "result.json of a cell": "sweep/*/*/result.json"},
    ),
)


# The two versions train with other seeds. What they find lies side by side.
SWEEP = """
seeds = [{seed}]
models = [{{name = "m", model = "model"}}]
texts = [{{name = "t", train = ["text0.txt"], evaluate = ["text0.txt"]}}]
evaluation = {{max_tokens = 64, max_seq_len = 16}}
recipes = [{{name = "r", recipe = "fast", num_steps = 2, max_seq_len = 16, tokens_per_step = 32, warm_start_tokens = 96}}]
"""


def prepare(folder: Path) -> None:
    """Write what the commands read: a model, two texts, two GGUF files, two lenses, and settings of sweeps."""
    import gguf
    import mlx.core as mx
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    import zoo
    from metalens import TunedLens
    from support.gguf_files import tokenizer_metadata, write_model
    from support.saved_models import save_zoo_model

    save_zoo_model(folder / "model", "llama", num_hidden_layers=3)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["the model says what the model sees"] * 9, trainers.BpeTrainer(vocab_size=131, special_tokens=["<end>"]))
    for version in (OLDER, NEWER):
        rng = np.random.default_rng(version)
        (folder / f"text{version}.txt").write_text(" ".join(f"w{i}" for i in rng.integers(0, 90, 60 * LENGTH)))
        (folder / f"sweep{version}.toml").write_text(SWEEP.format(seed=version))
        lens = TunedLens(3, 64)
        for translator in lens.translators:
            translator.weight = translator.weight + mx.array(0.1 * rng.standard_normal((64, 64)).astype(np.float32))
        lens.save(folder / f"lens{version}")
        path = folder / f"model{version}.gguf"
        write_model(
            path,
            "qwen2",
            zoo.CONFIGS["qwen2"],
            zoo.build("qwen2", version),
            gguf.GGMLQuantizationType.Q8_0,
            tokens=tokenizer_metadata(tokenizer, "gpt-2"),
        )


def contents(folder: Path, job: Job) -> dict[str, dict[str, bytes]]:
    """Return {name of a file: {path: its bytes}} of what a job has written, without temporary files."""
    return {
        name: {str(p.relative_to(folder)): _content(p) for p in sorted(folder.glob(pattern)) if not p.name.startswith(".")}
        for name, pattern in job.files.items()
    }


def _content(path: Path) -> bytes:
    """Return the bytes of a file, without what a clock has measured."""
    data = path.read_bytes()
    if path.match("sweep/*/*/result.json"):
        found = json.loads(data)
        return json.dumps({key: value for key, value in found.items() if key not in TIMED}).encode()
    if path.suffix != ".jsonl":
        return data
    lines = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):  # the last line may be half a line
            lines.append(json.dumps({key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}))
    return "\n".join(lines).encode()


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files and locks in a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if not path.name.endswith(".lock") or path.parent.name != "cache"]


def age(folder: Path) -> None:
    """Make temporary files look as if their writers had ended long ago."""
    for name in leftovers(folder):
        os.utime(folder / name, (0, 0))


@contextlib.contextmanager
def restored(folder: Path, saved: Path) -> Iterator[Path]:
    """Yield a folder with the contents of another one, and empty it afterwards: a lens remembers paths, so all trials run in one folder."""
    shutil.copytree(saved, folder, dirs_exist_ok=True, symlinks=True)
    try:
        yield folder
    finally:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
