"""translate_norm, RMSNorm(W h + b), forward and with the gradient at W and b."""

import pytest
from benchmarks.competitor import OURS, PLAIN, TORCH
from benchmarks.operations import translate_norm
from benchmarks.suite import Work

ROWS = 512


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradients"])
@pytest.mark.parametrize("width", [256, 1024])
def test_translate_norm(suite, width, gradient):
    work = Work(2.0 * ROWS * width**2 * (2 if gradient else 1))  # the gradient's product is dW
    names = [OURS, TORCH, *([PLAIN] if width == 256 else [])]  # MLX's products are slow on Linux CPUs
    label = f"{ROWS} rows, D {width}, {'with gradients' if gradient else 'forward'}"
    arguments = {"rows": ROWS, "width": width, "gradient": gradient}
    memory_of = [OURS, TORCH] if gradient and width > 256 else []
    suite.measure(translate_norm, arguments, names, label, work, title="translate_norm: RMSNorm(W h + b)", memory_of=memory_of, budget=5)
