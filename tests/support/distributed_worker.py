"""One process of a group, for training/test_distributed.py: runs the scenarios of a JSON file in turn and writes what came out of each.

Started by mlx.launch or with MLX's environment variables. A scenario is the arguments of `scenario` below.
"""

import importlib.util
import json
import os
import signal
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    # mlx_lm without what its __init__ imports (transformers and more), which takes most of the time until such a process runs.
    _package = types.ModuleType("mlx_lm")
    _package.__path__ = importlib.util.find_spec("mlx_lm").submodule_search_locations
    sys.modules["mlx_lm"] = _package

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama

from metalens import InterpretableModel
from metalens.training import CheckpointFolder, Group, MetricsFile, TrainingConfig, TrainingInterruptedError, messages, train_loop, update
from metalens.training.start import lens_to_start_from

LENGTH, LAYERS, HIDDEN, VOCABULARY = 16, 3, 32, 67


def model():
    """A Llama with random weights, the same in every process."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    mx.random.seed(0)
    made = llama.Model(args)
    made.update(tree_map(lambda p: p * 2 if p.ndim == 2 else p, made.parameters()))
    made.eval()
    mx.eval(made.parameters())
    return InterpretableModel(made)


def text():
    return mx.array(np.random.default_rng(5).integers(0, VOCABULARY, 40 * LENGTH + 5))


def scenario(
    interpretable,
    group,
    *,
    settings,
    folder=None,
    every=None,
    resume=False,
    metrics=None,
    ends=None,
    stops=None,
    other_settings=None,
    poisoned=None,
    bucket=None,
    start=None,
):
    """One run: {"weights": [...], "losses": [...], ...} or {"error": ...}.

    Args:
        interpretable: the model.
        group: the processes.
        settings: of TrainingConfig.
        folder: of the checkpoints; {rank} stands for the rank.
        every: steps between them.
        resume: as in train.
        metrics: file for MetricsFile, given to every process.
        ends: [rank, step, how]: how that process ends within that step.
        stops: [rank, step]: that process wants to stop after that step.
        other_settings: of all ranks but 0.
        poisoned: [layer, step] whose gradient is NaN.
        bucket: bytes.
        start: path of the lens that the run starts from.
    """
    seen, sums = [], []
    all_sum, accumulate = mx.distributed.all_sum, update.accumulate

    def counted(x, **others):
        sums.append(x.nbytes)
        return all_sum(x, **others)

    def wrapped(into, *others):
        if ends is not None and [group.rank, len(seen)] == ends[:2]:
            if ends[2] == "exit":
                os._exit(3)
            if ends[2] == "raise":
                raise KeyError("the reason")
            os.kill(os.getpid(), getattr(signal, ends[2]))
        accumulate(into, *others)
        if poisoned is not None and len(seen) == poisoned[1] and poisoned[0] in into.layers:
            gradient = into.gradients[into.layers.index(poisoned[0])]
            gradient["bias"] = gradient["bias"] * float("nan")

    before = messages.BUCKET_BYTES
    mx.distributed.all_sum, update.accumulate, messages.BUCKET_BYTES = counted, wrapped, bucket or before
    try:
        lens = train_loop(
            interpretable.source,
            interpretable.unembed,
            text(),
            TrainingConfig(**{"max_seq_len": LENGTH, **settings, **((other_settings or {}) if group.rank else {})}),
            callbacks=[*([MetricsFile(metrics)] if metrics else []), seen.append],
            checkpoints=CheckpointFolder(folder.format(rank=group.rank)) if folder else None,
            checkpoint_every=every,
            resume=resume,
            group=group,
            start=lens_to_start_from(start, group),
            stop=lambda: stops is not None and group.rank == stops[0] and len(seen) > stops[1],
        )
    except (ValueError, TrainingInterruptedError) as error:
        return {"error": f"{type(error).__name__}: {error}", "steps": len(seen)}
    finally:
        mx.distributed.all_sum, update.accumulate, messages.BUCKET_BYTES = all_sum, accumulate, before
    return {
        "weights": [[np.array(t.weight).tolist(), np.array(t.bias).tolist()] for t in lens.translators],
        "losses": [p.losses for p in seen],
        "layers": [p.layers for p in seen],
        "norms": [p.gradient_norm for p in seen],
        "tokens": [p.tokens for p in seen],
        "skipped": seen[-1].skipped if seen else 0,
        "sums": sums,
    }


def main():
    scenarios, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    mx.set_default_device(mx.cpu)
    interpretable = model()
    for each in scenarios:
        name, parallel, timeout = each.pop("name"), each.pop("parallel"), each.pop("timeout", 150)
        group = Group.from_environment(parallel, timeout)
        (out / f"{name}.{group.rank}.json").write_text(json.dumps(scenario(interpretable, group, **each)))


if __name__ == "__main__":
    main()
