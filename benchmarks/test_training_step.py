"""One training step of the demo model's lens (forward, loss, gradient), native kernels beside plain MLX.

64 tokens, because plain MLX is slow on Linux CPUs.
"""

import mlx.core as mx
import pytest

from metalens import InterpretableModel, TunedLens, accelerate, use_backend
from metalens.demo import HELD_OUT_TEXT, MODEL
from metalens.training import loss_and_gradient

GROUP = "training step, demo model, 64 tokens x 8 layers"


def test_exponential_of_its_logits(benchmark):
    """The part of the step that MLX's elementwise exp takes, whatever the backend: 8 layers' rows and the model's own."""
    logits = mx.random.normal((9 * 64, 6000))
    mx.eval(logits)
    benchmark.group = GROUP
    benchmark.pedantic(lambda: mx.eval(mx.exp(logits)), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_training_step(benchmark, backend):
    model = InterpretableModel(str(MODEL))
    accelerate(model.model)  # with the reference backend these layers run plain MLX, as unaccelerated ones do
    ids = model.ids(HELD_OUT_TEXT.read_text(encoding="utf-8")[:2000])[:, :64]
    lens = TunedLens(len(model.source), model.unembed.hidden_dim)
    benchmark.group = GROUP

    def step():
        losses, gradient = loss_and_gradient(lens, model.source.capture(ids), model.unembed)
        mx.eval(losses, gradient)

    with use_backend(backend):
        benchmark.pedantic(step, rounds=3, warmup_rounds=1)
