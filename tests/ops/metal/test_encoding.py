"""Test the memory that MLX keeps because it encodes ahead of the GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.ops.metal import encoding, kl, matrix_units, tuning
from metalens.ops.metal.encoding import ELEMENTS, Array
from metalens.ops.metal.speed import mlx_multiplies_faster

M1 = tuning.Device("applegpu_g13g", int(5.3 * 2**30), 8)
M4_MAX = tuning.Device("applegpu_g16s", 48 * 2**30, 40)
M5 = tuning.Device("applegpu_g17g", 10 * 2**30, 10, matrix_units=True)
LLAMA = kl.HeadSizes(128_256, 2048, 4, 64)


def chain(count, elements):
    """Operations that each make an array, of one byte, from the one before."""
    made = [Array(("made", i), elements, 1) for i in range(count + 1)]
    return [(made[i], made[i + 1]) for i in range(count)]


def test_large_operations_are_command_buffers_of_their_own():
    assert encoding.most_bytes(chain(100, ELEMENTS // 2)) == 11 + 1
    assert encoding.most_bytes(chain(5, ELEMENTS)) == 6


def test_a_command_buffer_counts_an_array_once_and_elements_not_bytes():
    shared = Array(("U", 0), ELEMENTS - 10, 0)
    # With U a command buffer ends at ten elements more.
    assert encoding.most_bytes([(shared, Array(("x", i), 1, 4)) for i in range(1000)]) == 11 * 10 * 4


def test_small_operations_end_a_command_buffer_by_their_number():
    assert encoding.most_bytes([(Array(("x", i), 1, 1),) for i in range(2000)]) == 11 * 51


@given(st.lists(st.integers(1, ELEMENTS), max_size=200))
def test_no_more_than_all_arrays_and_hardly_more_than_the_limit(sizes):
    found = encoding.most_bytes([(Array(("x", i), size, size),) for i, size in enumerate(sizes)])
    assert found <= sum(sizes)
    assert found <= 11 * 2 * ELEMENTS
    assert found == sum(sizes) or found >= 10 * min(ELEMENTS, 51 * min(sizes))


def test_a_short_loss_holds_its_chunks_and_the_model_s_logits():
    with tuning.planned_for(M4_MAX):
        layers, tokens, of_model = kl.chunk_shape(80, 4096, 128_256, 2048, rounded=False)
        pair = 128_256 * layers * tokens * 8
        assert mlx_multiplies_faster(tokens, LLAMA.matrix)  # and MLX first makes copies of the scales
        assert kl.loss_bytes(layers, tokens, LLAMA, rounded=False) == pair + 4 * 128_256 * tokens + 4 * LLAMA.scales
        assert of_model >= tokens


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("gpu", [M1, M4_MAX, M5], ids=["M1", "M4 Max", "M5"])
@pytest.mark.parametrize("head", [LLAMA, kl.HeadSizes(32_000, 2048, 4, 64), kl.HeadSizes(49_152, 576, 16, 0)], ids=["llama", "small", "dense"])
def test_a_long_loss_holds_a_bounded_number_of_chunks(gpu, head, rounded, monkeypatch):
    with tuning.planned_for(gpu):
        layers, tokens, _ = kl.chunk_shape(32, 100_000, head.vocab, head.depth, rounded)
        pair = head.vocab * layers * tokens * (8 if kl._gradient_type(rounded).size == 4 else 6)
        long = kl.loss_bytes(32, 100_000, head, rounded)
        assert 4 * pair <= long + pair  # every kernel a command buffer of its own: eleven of them touch four chunks or more
        assert rounded or 4 * pair <= long <= 17.2 * pair  # with the model's logits
        # Each command buffer but for its last operation has fewer elements than the limit; that one adds a chunk's two arrays and the model's logits.
        assert long <= 11 * 4 * (ELEMENTS + 3 * head.vocab * layers * tokens)
        monkeypatch.setattr(kl, "MOST_CHUNKS", 2 * kl.MOST_CHUNKS)
        assert kl.loss_bytes(32, 100_000, head, rounded) <= 1.01 * long


def test_matrix_units_hold_dequantized_rows_and_wider_scales_too(monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    with tuning.planned_for(M5):
        rows = matrix_units.FEWEST_ROWS_BACKWARD
        found = kl.loss_bytes(1, rows, LLAMA, rounded=True)
        arrays = 128_256 * rows * (4 + 4 + 4)  # logits, gradient, the model's logits
        dequantized, scales = 4 * 128_256 * 2048, 4 * LLAMA.scales
        assert found == arrays + dequantized + 3 * scales
        assert found - kl.loss_bytes(1, rows, LLAMA, rounded=False) == dequantized + 3 * scales


def test_the_elements_of_a_head():
    assert LLAMA.elements == 128_256 * 2048 // 8 + 2 * 128_256 * 2048 // 64
    assert kl.HeadSizes(10, 32, 16, 0).elements == 320
