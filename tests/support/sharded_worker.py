"""One process of a group that divides its model, for training/test_sharded.py: runs the scenarios of a JSON file and writes what came out of each.

Started by mlx.launch or with MLX's environment variables. A scenario is {"name": ..., "do": a function below, ...arguments}. "{rank}" in a text is
the rank.
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["METALENS_NUM_THREADS"] = "1"  # each process has more threads than this machine has cores without

import mlx.core as mx
import numpy as np
from click.testing import CliRunner

import metalens
from metalens.cli import main as command
from metalens.lenses.translators import identity_linear
from metalens.training import CheckpointFolder, Group, TrainingInterruptedError, train, update

TEXT = np.random.default_rng(5).integers(0, 96, 1000)
IDS = TEXT[:9]


def _load(model, group):
    return metalens.load(model, tensor_group=group if group.size > 1 else None)


def _train(loaded, group, settings, **options):
    seen = []
    lens = train(loaded, mx.array(TEXT), group=group, callbacks=[seen.append], **settings, **options)
    return lens, seen


def streams(group, model):
    """Hidden states and logits of a text, and what was found of the model."""
    loaded = _load(model, group)
    captured = loaded.capture(mx.array(IDS[None]))
    arrays = [*captured.hidden, captured.logits]
    return {
        "arrays": [np.array(a.astype(mx.float32))[0].tolist() for a in arrays],
        "hash": loaded.weights_hash,
        "paths": loaded.unembed.paths,
        "head": list(loaded.unembed.head.weight.shape),
        "native": len(loaded.acceleration),
        "bytes": sum(a.nbytes for _, a in metalens.models.weights.named_arrays(loaded.model)),
    }


def trained(group, model, settings, evaluate=False, scores=0, stop=None, folder=None, resume=False, kill=None):
    """A run, and readings and scores of its lens.

    Args:
        group: processes.
        model: folder.
        settings: settings of the run.
        evaluate: also evaluate the lens, with everything.
        scores: evaluate it on so many tokens, without more.
        stop: step after which the run is stopped, by the last process.
        folder: folder for checkpoints.
        resume: as in train.
        kill: step in which the last process ends without a word.
    """
    loaded = _load(model, group)
    last = group.rank == group.size - 1
    count, sums = [], update.accumulate

    def counted(*arguments):
        count.append(1)
        if kill is not None and last and len(count) > kill:
            os._exit(3)
        sums(*arguments)

    update.accumulate = counted
    start = time.monotonic()
    try:
        lens, seen = _train(
            loaded,
            group,
            settings,
            resume=resume,
            checkpoint_dir=CheckpointFolder(folder) if folder else None,
            checkpoint_every=1 if folder else None,
            stop=lambda: stop is not None and last and len(count) >= stop,
        )
    except TrainingInterruptedError as error:
        return {"stopped": str(error)}
    finally:
        update.accumulate = sums
    found = {
        "weights": [[np.array(t.weight).tolist(), np.array(t.bias).tolist()] for t in lens.translators],
        "losses": [progress.losses for progress in seen],
        "norms": [progress.gradient_norm for progress in seen],
        "about": {name: lens.provenance[name] for name in ("head", "weights", "tokens")},
        "seconds": time.monotonic() - start,
    }
    if scores:
        found["scores"] = metalens.evaluate(loaded, mx.array(TEXT[:scores]), _everywhere(lens, group), max_seq_len=16).to_dict()
    if evaluate:
        lens = _everywhere(lens, group)
        lens.embedding_translator = identity_linear(lens.hidden_dim)
        lens.embedding_translator.bias = mx.full((lens.hidden_dim,), 0.1)
        scores = metalens.evaluate(loaded, mx.array(TEXT[:33]), lens, max_seq_len=16, layer_transfer=True, logit_stats=True, embedding=True)
        found["scores"] = scores.to_dict()
        found["marginals"] = {name: each.sufficient_stats.tolist() for name, each in scores.logit_stats.items()}
        found["reading"] = loaded.read(mx.array(IDS), lens, top_k=2).predictions
    return found


def _everywhere(lens, group):
    """The lens of rank 0 in every process, as if it was read from a file."""
    for translator in lens.translators:
        for name, value in group.broadcast(dict(translator.parameters())).items():
            setattr(translator, name, value)
    return lens


def other_ids(group, model):
    """Processes that read different texts."""
    loaded = _load(model, group)
    loaded.capture(mx.array(IDS[None]) + group.rank)


def other_group(group, model):
    """A run that divides the text of a divided model."""
    train(_load(model, group), mx.array(TEXT), num_steps=1, max_seq_len=16, group=Group("data", group.group))


def cli(group, arguments):
    """A command: its exit code and what it prints."""
    done = CliRunner().invoke(command, [argument.format(rank=group.rank) for argument in arguments])
    return {"code": done.exit_code, "out": done.stdout, "err": done.stderr}


def main():
    scenarios, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    mx.set_default_device(mx.cpu)
    group = Group.from_environment("layers", 150)
    for each in scenarios:
        name, do = each.pop("name"), globals()[each.pop("do")]
        start = time.monotonic()
        arguments = {key: value.format(rank=group.rank) if isinstance(value, str) else value for key, value in each.items()}
        try:
            found = do(group, **arguments)
        except metalens.MetalensError as error:
            found = {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
        (out / f"{name}.{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
