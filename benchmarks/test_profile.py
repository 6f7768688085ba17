"""Measure the fraction of a training step's time in the native kernels; see profile_loop.py."""

import mlx.core as mx
from benchmarks.profile_loop import profile

from metalens import use_backend

TOKENS, TOKENS_REFERENCE = 128, 32  # the reference backend is slow on Linux CPUs


def test_profile(benchmark):
    benchmark.group = "profile of a training step"
    with use_backend("native"):
        ours = profile(TOKENS)
    with use_backend("reference"):
        plain = profile(TOKENS_REFERENCE, rounds=1)
    assert 0 < ours.kernel_fraction <= 1
    benchmark.extra_info["profile"] = {"tokens": TOKENS, "tokens_reference": TOKENS_REFERENCE, "native": ours.to_dict(), "reference": plain.to_dict()}
    # A fixed reference that no backend changes: MLX's elementwise exponential of the number of logits in a step.
    logits = mx.random.normal((9 * TOKENS, 6000))
    mx.eval(logits)
    benchmark.pedantic(lambda: mx.eval(mx.exp(logits)), rounds=5, warmup_rounds=1)
