"""Measure the stages of a training step, and the fraction of its time in the native kernels.

    python -m benchmarks.profile_loop [MODEL] [--tokens 128] [--native-only]

MODEL is the demo model, or any name that `metalens.load` takes. Plain MLX is slow on Linux CPUs: --native-only leaves it out.

A step is divided into the stages of `loss_and_gradient` and of the optimizer; each stage is evaluated to its end before the next one
starts. The real step evaluates some of them together, so the sum may differ a little from the time of a step, which is measured too.

The capture mixes kernels and MLX's own operations: there, every call of the extension is timed alone, with its inputs evaluated before.
The other stages are our kernels plus a few elementwise operations of MLX, and count entirely as kernels. The optimizer is MLX's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import mlx.core as mx
from benchmarks.operations.training import CONFIG, NAME, named_model

from metalens import InterpretableModel, TunedLens, _extension, use_backend
from metalens.lenses.translators import parameters_of
from metalens.models.bundled import TRAINING_TEXT
from metalens.ops import lens_kl, lens_target, translate_norm
from metalens.readings.rows import lens_rows
from metalens.training import loss_and_gradient
from metalens.training.optimizer import LensOptimizer, gradient_norm

# Stages that do not count entirely as kernels.
CAPTURE, OPTIMIZER = "capture", "optimizer"


@dataclass(frozen=True)
class Profile:
    """Median seconds for one sequence.

    Attributes:
        stages: seconds of each stage, evaluated alone.
        capture_kernel_fraction: fraction of the capture's time in calls of the extension; 0 on the reference backend.
        step: seconds of the same work in one evaluation, as in training.
    """

    stages: dict[str, float]
    capture_kernel_fraction: float
    step: float

    @property
    def kernel_fraction(self) -> float:
        """Return the fraction of all stages' time in the native kernels; meaningless on the reference backend."""
        lens = sum(seconds for stage, seconds in self.stages.items() if stage not in (CAPTURE, OPTIMIZER))
        return (lens + self.capture_kernel_fraction * self.stages[CAPTURE]) / sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as the report reads it."""
        return asdict(self) | {"kernel_fraction": self.kernel_fraction}


class TimedExtension:
    """A stand-in for the extension that adds up the seconds of its operations."""

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._extension, name)
        if isinstance(member, type) or name in ("isa", "available_isas", "num_threads"):
            return member

        def timed(*args: Any, **kwargs: Any) -> Any:
            mx.eval([a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)])
            start = time.perf_counter()
            result = member(*args, **kwargs)
            mx.eval(result)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@contextmanager
def timed_extension() -> Iterator[TimedExtension | None]:
    """Measure the time in the extension during a block; yield None if there is no extension."""
    extension, _ = _extension.find()
    if extension is None:
        yield None
        return
    proxy = TimedExtension(extension)
    with mock.patch.object(_extension, "find", return_value=(proxy, "")), mock.patch.object(_extension, "load", return_value=proxy):
        yield proxy


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def stages(model: InterpretableModel, ids: mx.array) -> dict[str, Callable[[], Any]]:
    """Return a function for each stage of a training step of a model on ids [1, T]; their inputs are evaluated already."""
    unembed, lens = model.unembed, TunedLens(len(model.source), model.unembed.hidden_dim)
    captured = model.source.capture(ids)
    hidden = [h.reshape(-1, lens.hidden_dim).astype(mx.float32) for h in captured.hidden]
    target = lens_target(unembed.norm(hidden[-1]), unembed.head)
    n = lens_rows(hidden, range(lens.num_layers), lens, unembed.norm)
    _, dn = lens_kl(n, target, unembed.head)
    mx.eval(hidden, vars(target), n, dn)
    _, gradient = loss_and_gradient(lens, captured, unembed)
    parameters = dict(enumerate(map(parameters_of, lens.translators)))
    optimizer = LensOptimizer(CONFIG, parameters)

    def translator_gradients() -> list[mx.array]:
        def rows(h: mx.array) -> Callable[..., mx.array]:
            return lambda weight, bias: translate_norm(h, weight, bias, unembed.norm)

        return [mx.vjp(rows(h), [t.weight, t.bias], [cotangent])[1] for h, t, cotangent in zip(hidden, lens.translators, dn, strict=True)]

    def optimize() -> list[Any]:
        scale = optimizer.clip(gradient_norm(gradient["translators"]))
        return [optimizer.update(layer, p, gradient["translators"][layer], 0, scale) for layer, p in parameters.items()]

    return {
        CAPTURE: lambda: model.source.capture(ids).hidden,
        "lens_target": lambda: vars(lens_target(unembed.norm(hidden[-1]), unembed.head)),
        "translate_norm": lambda: lens_rows(hidden, range(lens.num_layers), lens, unembed.norm),
        "lens_kl": lambda: lens_kl(n, target, unembed.head),
        "translator_gradients": translator_gradients,
        OPTIMIZER: optimize,
    }


def profile(tokens: int = CONFIG.max_seq_len, rounds: int = 5, name: str = NAME) -> Profile:
    """Profile one sequence of the bundled text on the backend in use."""
    model = named_model(name)
    # No tokenizer makes so few tokens of English that 16 characters for each are too few.
    ids = model.training_ids([TRAINING_TEXT.read_text(encoding="utf-8")[: 16 * tokens]])[None, :tokens]
    lens = TunedLens(len(model.source), model.unembed.hidden_dim)
    seconds = {stage: median_seconds(run, rounds) for stage, run in stages(model, ids).items()}
    seconds[OPTIMIZER] /= CONFIG.sequences_per_step  # the optimizer runs once per step
    step = median_seconds(lambda: loss_and_gradient(lens, model.source.capture(ids), model.unembed), rounds)
    return Profile(seconds, fraction_in_kernels(lambda: mx.eval(model.source.capture(ids).hidden), rounds), step)


def fraction_in_kernels(run: Callable[[], None], rounds: int) -> float:
    """Return the fraction of a function's time in the extension, with every call of the extension timed alone."""
    with timed_extension() as extension:
        if extension is None:
            return 0.0
        run()
        extension.seconds = 0.0
        start = time.perf_counter()
        for _ in range(rounds):
            run()
        return extension.seconds / (time.perf_counter() - start)


def main() -> None:
    """Print the profiles of both backends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=NAME, help="model to profile [default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=CONFIG.max_seq_len, help="tokens of the sequence [default: %(default)s]")
    parser.add_argument("--native-only", action="store_true", help="do not run plain MLX")
    arguments = parser.parse_args()
    with use_backend("native"):
        ours = profile(arguments.tokens, name=arguments.model)
    plain = None
    if not arguments.native_only:
        with use_backend("reference"):
            plain = profile(arguments.tokens, 1, arguments.model)
    for stage, seconds in ours.stages.items():
        print(f"{stage:40} {seconds * 1e3:8.1f} ms" + ("" if plain is None else f"   plain MLX {plain.stages[stage] * 1e3:8.1f} ms"))
    print(f"{'step, without the optimizer':40} {ours.step * 1e3:8.1f} ms" + ("" if plain is None else f"   plain MLX {plain.step * 1e3:8.1f} ms"))
    print(f"time in the native kernels: {ours.kernel_fraction:.0%} of all stages, {ours.capture_kernel_fraction:.0%} of the capture")


if __name__ == "__main__":
    main()
