"""Test that the gradient may overwrite the chunk of logits, as the ahead-of-time launcher lets it (MLX's just-in-time kernels cannot)."""

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from metalens.ops.metal import constants, descriptors, source
from support import oracle
from support.metal_emulation import needs_clang

pytestmark = needs_clang


@pytest.mark.parametrize("with_offset", [0, 1])
@pytest.mark.parametrize("vocab", [131, 700])
@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_the_gradient_in_the_place_of_the_chunk(rng, vocab, schedule, with_offset):
    rows, tokens, width = 6, 3, vocab + 5
    z_model = oracle.random_array(rng, tokens, width)
    difference = oracle.random_array(rng, rows, width, scale=0.3)
    offset = with_offset * oracle.random_array(rng, width, scale=3)
    lse = mx.logsumexp((z_model + offset)[:, :vocab], axis=-1)
    kernel = descriptors.lens_softmax_grad(mx.float32)
    values = {"rows": rows, "tokens": tokens, "width": width, "vocab": vocab, "is_delta": 1, "with_offset": with_offset}
    problem = mx.array(source.pack(kernel.header, "SoftmaxGradProblem", values | {"softcap": 0.0, "grad_scale": 1.0}))
    padded_lse = mx.concatenate([lse, mx.zeros(8)])

    def run(in_place=None):
        launch = mslcpu.metal_kernel(
            name=kernel.name,
            input_names=[a.name for a in kernel.inputs],
            output_names=[a.name for a in kernel.outputs],
            source=kernel.body,
            header=source.inlined(kernel.header),
        )
        return launch(
            inputs=[difference, z_model, padded_lse, offset, problem],
            grid=(rows * kernel.threads, 1, 1),
            threadgroup=(kernel.threads, 1, 1),
            output_shapes=[(rows, width), (rows, map_columns_of(width)), *[(rows,)] * 4],
            output_dtypes=[mx.float32] * 6,
            in_place=in_place,
        )

    with mslcpu.options(schedule=schedule):
        apart = run()
        together = run(in_place={"gradient": "chunk"})  # one address, through two pointers that the compiler may assume not to overlap
    for ours, expected in zip(together, apart, strict=True):
        assert np.array_equal(np.array(ours), np.array(expected))
    p_model, z = oracle.wide(z_model + offset)[:, :vocab], oracle.wide(difference)[:, :vocab]
    expected_kl, expected_gradient = oracle.kl_and_difference(np.tile(p_model, (2, 1)), np.tile(p_model, (2, 1)) + z)
    np.testing.assert_allclose(oracle.wide(together[0])[:, :vocab], expected_gradient, atol=1e-7)
    np.testing.assert_allclose(oracle.wide(together[3]), expected_kl, rtol=1e-5)
    assert not np.any(oracle.wide(together[0])[:, vocab:])
    z_lens = np.tile(p_model, (2, 1)) + z
    np.testing.assert_allclose(oracle.wide(together[4]), z_lens[:, 0] - oracle.log_softmax(z_lens)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(oracle.wide(together[5]), oracle.entropy(z_lens), rtol=1e-5)
    by_32 = np.pad(np.abs(expected_gradient), ((0, 0), (0, -vocab % 32 + 32 * (map_columns_of(width) - map_columns_of(vocab)))))
    np.testing.assert_allclose(oracle.wide(together[1]), by_32.reshape(rows, -1, 32).max(-1), atol=1e-7)
    np.testing.assert_allclose(oracle.wide(together[2]), np.abs(expected_gradient).sum(-1), rtol=1e-5)


def map_columns_of(width):
    return -(-width // constants.MAP_WIDTH)
