"""Where a training step spends its time: by stage, and how much of it in the native kernels.

    python -m benchmarks.profile_loop

A step is cut into the stages of `loss_and_gradient` and of the optimizer, each evaluated to its end before the next one starts. (The real step
evaluates some of them together, so the sum may differ a little from a step's time, which is given too.) In the capture, where kernels and MLX's own
operations mix, every call of the extension is timed by itself, with its inputs evaluated before. The other stages are our kernels plus a few
elementwise operations of MLX, and are counted as kernels as a whole; the optimizer is MLX's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import mlx.core as mx
from benchmarks.operations.training import CONFIG, demo_model, training_ids

from metalens import TunedLens, _extension, use_backend
from metalens.lenses.translators import parameters_of
from metalens.ops import lens_kl, lens_target, translate_norm
from metalens.readings.rows import lens_rows
from metalens.training import loss_and_gradient
from metalens.training.optimizer import LensOptimizer, gradient_norm

CAPTURE, OPTIMIZER = "capture of the streams", "optimizer"


@dataclass(frozen=True)
class Profile:
    """Median seconds for one sequence.

    Attributes:
        stages: of each stage, evaluated alone.
        capture_share: of the capture, the share in calls of the extension; 0 on the reference backend.
        step: of the same work in one go, as training runs it.
    """

    stages: dict[str, float]
    capture_share: float
    step: float

    @property
    def kernel_share(self) -> float:
        """Of all stages, the share in the native kernels; meaningless on the reference backend."""
        lens = sum(seconds for stage, seconds in self.stages.items() if stage not in (CAPTURE, OPTIMIZER))
        return (lens + self.capture_share * self.stages[CAPTURE]) / sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return {"stages": self.stages, "capture_share": self.capture_share, "step": self.step, "kernel_share": self.kernel_share}


class TimedExtension:
    """Stands for the extension and notes how long its operations take."""

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
    """Count the time in the extension during a block; None where there is no extension."""
    extension, _ = _extension.find()
    if extension is None:
        yield None
        return
    proxy = TimedExtension(extension)
    with mock.patch.object(_extension, "find", return_value=(proxy, "")), mock.patch.object(_extension, "load", return_value=proxy):
        yield proxy


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def profile(tokens: int = CONFIG.max_seq_len, rounds: int = 5) -> Profile:
    """One sequence of the demo model, on whichever backend is in use."""
    model = demo_model()
    unembed, lens, ids = model.unembed, TunedLens(len(model.source), model.unembed.hidden_dim), training_ids()[None, :tokens]
    stream = model.source.capture(ids)
    hidden = [h.reshape(-1, lens.hidden_dim).astype(mx.float32) for h in stream.hidden]
    target = lens_target(unembed.norm(hidden[-1]), unembed.head)
    n = lens_rows(hidden, range(lens.num_layers), lens, unembed.norm)
    _, dn = lens_kl(n, target, unembed.head)
    mx.eval(hidden, vars(target), n, dn)
    _, gradient = loss_and_gradient(lens, stream, unembed)
    parameters = dict(enumerate(map(parameters_of, lens.translators)))
    optimizer = LensOptimizer(CONFIG, parameters)

    def translators() -> list[mx.array]:
        def rows(h: mx.array) -> Callable[..., mx.array]:
            return lambda weight, bias: translate_norm(h, weight, bias, unembed.norm)

        return [mx.vjp(rows(h), [t.weight, t.bias], [cotangent])[1] for h, t, cotangent in zip(hidden, lens.translators, dn, strict=True)]

    def optimize() -> list[Any]:
        scale = optimizer.clip(gradient_norm(gradient["translators"]))
        return [optimizer.update(layer, p, gradient["translators"][layer], 0, scale) for layer, p in parameters.items()]

    stages: dict[str, Callable[[], Any]] = {
        CAPTURE: lambda: model.source.capture(ids).hidden,
        "the model's own rows (lens_target)": lambda: vars(lens_target(unembed.norm(hidden[-1]), unembed.head)),
        "translators and norm (translate_norm)": lambda: lens_rows(hidden, range(lens.num_layers), lens, unembed.norm),
        "head, KL and its gradient (lens_kl)": lambda: lens_kl(n, target, unembed.head),
        "gradients of the translators": translators,
    }
    seconds = {stage: median_seconds(run, rounds) for stage, run in stages.items()}
    seconds[OPTIMIZER] = median_seconds(optimize, rounds) / CONFIG.sequences_per_step  # runs once per step
    step = median_seconds(lambda: loss_and_gradient(lens, model.source.capture(ids), unembed), rounds)
    return Profile(seconds, capture_share(lambda: mx.eval(model.source.capture(ids).hidden), rounds), step)


def capture_share(capture: Callable[[], None], rounds: int) -> float:
    """Of captures with every kernel timed by itself, the share of the time in kernels."""
    with timed_extension() as extension:
        if extension is None:
            return 0.0
        capture()
        extension.seconds = 0.0
        start = time.perf_counter()
        for _ in range(rounds):
            capture()
        return extension.seconds / (time.perf_counter() - start)


def main() -> None:
    """Print both backends' profiles."""
    with use_backend("native"):
        ours = profile()
    with use_backend("reference"):
        plain = profile(rounds=1)
    for stage, seconds in ours.stages.items():
        print(f"{stage:40} {seconds * 1e3:8.1f} ms   plain MLX {plain.stages[stage] * 1e3:8.1f} ms")
    print(f"{'capture, of that in kernels':40} {ours.capture_share:8.0%}")
    print(f"{'all in one go, without the optimizer':40} {ours.step * 1e3:8.1f} ms   plain MLX {plain.step * 1e3:8.1f} ms")
    print(f"in the native kernels: {ours.kernel_share:.0%}")


if __name__ == "__main__":
    main()
