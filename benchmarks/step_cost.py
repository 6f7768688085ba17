"""The time of a training step beside that of the model's forward pass with its own logits, for each token.

    python -m benchmarks.step_cost [smollm2] [--tokens 128 512] [--groups 1]

Trains all layers with the recipe `fast` on the bundled text, and prints the mean of the steps, the median of forward passes around them, and their
ratio. Short steps are captured together, so their times are uneven: what counts is the time of whole groups of them, but for the first. Run it on an
otherwise idle machine.
"""

from __future__ import annotations

import argparse
import time

import mlx.core as mx
import numpy as np

import metalens
from metalens.models.bundled import TRAINING_TEXT
from metalens.ops import lens_stats, normed
from metalens.training.batching import steps_together

LENGTH = 128
PASSES = 4
TOP_K = 8  # of the model's own logits, as a step takes them


def now() -> np.ndarray:
    """Return the time of the wall clock and the time of all cores, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def step_and_forward(model: metalens.InterpretableModel, tokens: int, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the time of a token in steps of `fast` on all layers, and in forward passes with the model's own logits before and after them.

    Args:
        model: the model.
        tokens: tokens of a step.
        groups: number of groups of steps that are captured together, beside the first.

    Returns:
        Two arrays as of `now`, for each token.
    """
    ids = np.array(model.training_ids([TRAINING_TEXT.read_text(encoding="utf-8")]))
    batch = mx.array(ids[: 4 * LENGTH].reshape(4, LENGTH))

    def forward() -> np.ndarray:
        start = now()
        states = model.source.capture(batch)
        rows = normed(states.rows(-1).astype(mx.float32), model.unembed.norm)
        mx.eval(states.hidden, lens_stats(rows[None], model.unembed.head, TOP_K).top_ids)
        return (now() - start) / batch.size

    forward()
    passes = [forward() for _ in range(PASSES)]
    ends: list[np.ndarray] = []
    settings = {"max_seq_len": LENGTH, "tokens_per_step": tokens, "warm_start_tokens": 1024, "guard_tokens": 0, "repeat": True}
    first = steps_together(metalens.recipe("fast", **settings))
    settings["num_steps"] = first * (1 + groups)
    metalens.train(model, [ids.tolist()], recipe="fast", callbacks=[lambda _, ends=ends: ends.append(now())], **settings)
    passes += [forward() for _ in range(PASSES)]
    return (ends[-1] - ends[first - 1]) / (len(ends) - first) / tokens, np.median(passes, axis=0)


def main() -> None:
    """Measure a model with steps of several sizes, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="tokens of a step [default: 128 512]")
    parser.add_argument("--groups", type=int, default=1, help="groups of steps to time, beside the first [default: %(default)s]")
    arguments = parser.parse_args()
    model = metalens.load(arguments.model)
    for tokens in arguments.tokens:
        found = step_and_forward(model, tokens, arguments.groups)
        for clock, step, forward in zip(("wall time", "time of all cores"), *found, strict=True):
            times = f"forward {forward * 1e3:.2f} ms/token, step {step * 1e3:.2f} ms/token, ratio {step / forward:.2f}"
            print(f"{arguments.model}, steps of {tokens}, {clock}: {times}")


if __name__ == "__main__":
    main()
