"""What comparing two sets of rows costs beside the statistics of one, and what a second lens and reading every layer of generated tokens add.

    python -m benchmarks.trajectories [--model demo] [--rounds 5]

The operations run side by side on a head of 32 064 x 1024 in 4 bits, 24 layers of 8 tokens. A product is one row through the head: `lens_stats` makes
one for each row, `lens_compare` two (it reads the head twice: for the normalizers, and for the divergences). Prints medians of CPU time, and the peak
of the process's memory beyond what it has before the call (on Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import metalens
from metalens.ops import Head, Weight, lens_compare, lens_stats

VOCAB, DIM, LAYERS, TOKENS = 32064, 1024, 24, 8
PROMPT = "The following example shows how to create a new"
GENERATED = 20
TEXT_TOKENS = 128


def resident(which: str) -> int:
    """Return the bytes of 'VmRSS' (now) or 'VmHWM' (the peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def cost(run: Callable[[], Any]) -> tuple[float, int]:
    """Return the CPU seconds of a call, and the peak of the process's memory beyond what it has before."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls left would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, start = resident("VmRSS"), time.process_time()
    run()
    return time.process_time() - start, resident("VmHWM") - before


def operations(rounds: int) -> None:
    """Print the cost of both operations for each product."""
    rng = np.random.default_rng(0)

    def rows() -> mx.array:
        return mx.array(rng.standard_normal((LAYERS, TOKENS, DIM)).astype(np.float32))

    u = mx.array(rng.standard_normal((VOCAB, DIM)).astype(np.float32) * 0.05)
    head, a, b = Head(Weight(*mx.quantize(u, 64, 4), 64, 4)), rows(), rows()
    mx.eval(a, b, vars(head.weight)["values"])
    products = LAYERS * TOKENS
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "lens_stats": (lambda: mx.eval(lens_stats(a, head, 10).lse), products),
        "lens_stats, all statistics": (
            lambda: mx.eval(lens_stats(a, head, 10, b[0], mx.zeros((TOKENS, 4), mx.int32), reverse=True).lse),
            products + TOKENS,
        ),
        "lens_compare": (lambda: mx.eval(lens_compare(a, b, head).js), 4 * products),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, (call, _) in calls.items():
            measured = cost(call)
            if turn:  # the first round warms up
                found[name].append(measured)
    for name, (_, count) in calls.items():
        seconds, memory = np.median([s for s, _ in found[name]]), max(m for _, m in found[name])
        print(f"{name}: {seconds / count * 1e6:.0f} us CPU a product, {memory / 2**20:.1f} MiB (logits: {products * VOCAB * 4 / 2**20:.0f} MiB)")


def lenses(name: str, rounds: int) -> None:
    """Print the cost of a text through one lens, through two lenses at once, and through two lenses one after the other."""
    model = metalens.load(name)
    tuned = metalens.TunedLens(model.num_layers, model.unembed.hidden_dim)
    text = (Path(metalens.__file__).parent / "assets" / "heldout.txt").read_text(encoding="utf-8")[: 5 * TEXT_TOKENS]
    ids = model.encode(text)[:TEXT_TOKENS]
    calls = {
        "one lens": lambda: [model.trajectory(ids)],
        "two lenses at once": lambda: model.trajectories(ids, [None, tuned]),
        "two lenses, one after the other": lambda: [model.trajectory(ids), model.trajectory(ids, tuned)],
    }
    found: dict[str, list[float]] = {call: [] for call in calls}
    for turn in range(rounds + 1):
        for call, read in calls.items():
            start = time.process_time()
            read()
            if turn:
                found[call].append(time.process_time() - start)
    for call, seconds in found.items():
        print(f"{name}, {len(ids)} tokens, {call}: {np.median(seconds):.2f} s CPU")


def generation(name: str, rounds: int) -> None:
    """Print the cost of a generated token: with the readings of all layers, and from the layer in the middle."""
    model = metalens.load(name)
    middle = model.num_layers // 2
    calls = {
        "generate_with_lens, all layers": lambda: model.generate_with_lens(PROMPT, max_tokens=GENERATED),
        "generate_with_lens, last layer": lambda: model.generate_with_lens(PROMPT, max_tokens=GENERATED, layers=[-1], compare=False),
        f"generate_from_layer {model.num_layers - 1}, the last": lambda: model.generate_from_layer(PROMPT, -1, max_tokens=GENERATED),
        f"generate_from_layer {middle}": lambda: model.generate_from_layer(PROMPT, middle, max_tokens=GENERATED),
    }
    found: dict[str, list[float]] = {call: [] for call in calls}
    for turn in range(rounds + 1):
        for call, start in calls.items():
            steps = start()
            next(steps)  # the prompt
            seconds, count = time.process_time(), sum(1 for _ in steps)
            if turn and count:
                found[call].append((time.process_time() - seconds) / count)
    for call, seconds in found.items():
        print(f"{name}, {call}: {np.median(seconds) * 1e3:.1f} ms CPU a token" if seconds else f"{name}, {call}: the text ended at once")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model that generates [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that warms up [default: %(default)s]")
    arguments = parser.parse_args()
    operations(arguments.rounds)
    lenses(arguments.model, arguments.rounds)
    generation(arguments.model, arguments.rounds)


if __name__ == "__main__":
    main()
