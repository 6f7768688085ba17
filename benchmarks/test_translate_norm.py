"""Time translate_norm, RMSNorm(W h + b), forward and with the gradient at W and b."""

import pytest
from benchmarks.competitor import OURS, PLAIN, TORCH
from benchmarks.operations import translate_norm
from benchmarks.suite import Case, Effort, Work

ROWS = 512


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradients"])
@pytest.mark.parametrize("hidden_size", [256, 1024])
def test_translate_norm(suite, hidden_size, gradient):
    work = Work(2.0 * ROWS * hidden_size**2 * (2 if gradient else 1))  # the gradient's product is dW
    names = [OURS, TORCH, *([PLAIN] if hidden_size == 256 else [])]  # MLX's products are slow on Linux CPUs
    label = f"{ROWS} rows, D {hidden_size}, {'with gradients' if gradient else 'forward'}"
    arguments = {"rows": ROWS, "hidden_size": hidden_size, "gradient": gradient}
    memory_of = [OURS, TORCH] if gradient and hidden_size > 256 else []
    case = Case(translate_norm, arguments, names, "translate_norm: RMSNorm(W h + b)", label, work, memory_of=memory_of)
    suite.measure(case, Effort(budget=5))
