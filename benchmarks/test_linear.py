"""The native products beside plain MLX on the CPU, at shapes small enough for MLX's reference BLAS on Linux.

make bench. Compare medians within a group of one run; machines drift, so a lone time says little.
"""

import mlx.core as mx
import pytest

from metalens.ops import Weight, linear, use_backend

SHAPES = [(128, 256, 704), (64, 256, 6000), (1, 256, 6000)]  # rows, inputs, outputs: the demo model's MLP and its head


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("transpose", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_quantized_matmul(benchmark, shape, transpose, backend):
    rows, inputs, outputs = shape
    values, scales, biases = mx.quantize(mx.random.normal((outputs, inputs)), 64, 4)
    weight = Weight(values, scales, biases, 64, 4)
    x = mx.random.normal((rows, inputs if transpose else outputs))
    mx.eval(values, scales, biases, x)
    benchmark.group = f"4-bit {'x W^T' if transpose else 'x W'}, {rows} rows, W [{outputs}, {inputs}]"
    benchmark.extra_info["flop"] = 2 * rows * inputs * outputs
    with use_backend(backend):
        benchmark.pedantic(lambda: mx.eval(linear(x, weight, transpose)), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_matmul(benchmark, backend):
    x, w = mx.random.normal((128, 256)), mx.random.normal((256, 256))
    mx.eval(x, w)
    benchmark.group = "dense x W^T, 128 rows, W [256, 256]: a translator"
    with use_backend(backend):
        benchmark.pedantic(lambda: mx.eval(linear(x, Weight(w))), rounds=7, warmup_rounds=1)
