import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.lenses.lens import LogitLens
from metalens.ops import Head, Weight, lens_stats, use_backend
from metalens.readings.rows import lens_rows, require_finite, select_layers, select_position
from metalens.utils.errors import InvalidTypeError


def test_all_layers_by_default():
    assert select_layers(None, 3) == [0, 1, 2]


@pytest.mark.parametrize("layers", [[], [2, 0], (1,), range(1, 3)])
def test_chosen_layers_keep_their_order(layers):
    assert select_layers(layers, 3) == list(layers)


@pytest.mark.parametrize(("layers", "chosen"), [([-1], [2]), ([-3, -1], [0, 2]), ([1, -2, 1], [1])])
def test_negative_layers_count_from_the_end_and_each_is_chosen_once(layers, chosen):
    assert select_layers(layers, 3) == chosen


@pytest.mark.parametrize(("layers", "named"), [([3], "no layer 3"), ([-4], "no layer -4"), ([0, 9, -20], "no layer 9, -20")])
def test_unknown_layers_are_named(layers, named):
    with pytest.raises(ValueError, match=f"layers 0 to 2; there is {named}"):
        select_layers(layers, 3)


@pytest.mark.parametrize("layers", [mx.array([0, -1]), np.array([0, 2]), [np.int64(0), 2]])
def test_arrays_of_layers_give_plain_numbers(layers):
    found = select_layers(layers, 3)
    assert found == [0, 2]
    assert all(type(layer) is int for layer in found)


@pytest.mark.parametrize("layers", [0, True, slice(0, 2), "01", [0.0], [True], mx.array([0.5])], ids=str)
def test_what_is_no_list_of_layers_is_named(tiny, layers):
    for call in (lambda: select_layers(layers, 3), lambda: tiny.logit_lens([1, 2], layers=layers)):
        with pytest.raises(InvalidTypeError, match="layers must be None or a list of layer numbers"):
            call()


@pytest.mark.parametrize("value", [1.0, "1", True, [1]], ids=str)
def test_a_position_and_top_k_are_whole_numbers(tiny, value):
    with pytest.raises(InvalidTypeError, match="top_k must be a whole number"):
        tiny.logit_lens([1, 2], top_k=value)
    with pytest.raises(InvalidTypeError, match="position must be None or a whole number"):
        tiny.logit_lens([1, 2], position=value)


def test_every_position_by_default():
    assert list(range(4))[select_position(None, 4)] == [0, 1, 2, 3]


@given(st.integers(1, 50).flatmap(lambda length: st.tuples(st.just(length), st.integers(-length, length - 1))))
def test_a_position_selects_what_indexing_would(case):
    length, position = case
    tokens = list(range(length))
    assert tokens[select_position(position, length)] == [tokens[position]]


@pytest.mark.parametrize("position", [5, 99, -6])
def test_positions_out_of_range(position):
    with pytest.raises(ValueError, match=rf"Position {position} is out of bounds for sequence length 5\. Valid range: \[-5, 4\]"):
        select_position(position, 5)


def test_rows_are_translated_and_normed_layer_by_layer():
    hidden = [mx.full((2, 3), float(i)) for i in range(4)]
    rows = lens_rows(hidden, [3, 1], lambda h, layer: h + 10 * layer, lambda h: 2 * h)
    np.testing.assert_array_equal(np.array(rows), np.stack([np.full((2, 3), 66.0), np.full((2, 3), 22.0)]))


def test_the_logit_lens_leaves_rows_alone():
    hidden = [mx.arange(6).reshape(2, 3).astype(mx.float32)]
    np.testing.assert_array_equal(np.array(lens_rows(hidden, [0], LogitLens(), lambda h: h)[0]), np.array(hidden[0]))


@pytest.mark.parametrize("layers", ["0", 3, [0.5], [None]])
def test_layers_that_are_no_numbers(layers):
    with pytest.raises(TypeError, match="list of layer numbers like"):
        select_layers(layers, 3)


def test_a_position_that_is_no_number():
    with pytest.raises(TypeError, match="whole number, got 1.0"):
        select_position(1.0, 3)


@pytest.mark.parametrize("lens", [lambda h, layer: h[:-1], lambda h, layer: h[:, :-1], lambda h, layer: h[None]], ids=["rows", "width", "rank"])
def test_a_lens_that_returns_another_shape(lens):
    with pytest.raises(ValueError, match=r"turned hidden states \(3, 4\) of layer 1 into"):
        lens_rows([mx.zeros((3, 4))] * 2, [1], lens, lambda h: h)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("bias", "value"), [([-np.inf] * 5, 1.0), ([0.0, np.inf, 0, 0, 0], 1.0), ([0.0] * 5, np.nan), ([0.0] * 5, np.inf)])
def test_logits_without_a_softmax_are_no_reading(backend, bias, value):
    head = Head(Weight(mx.ones((5, 3))), mx.array(bias))
    with use_backend(backend):
        good = lens_stats(mx.ones((2, 4, 3)), Head(Weight(mx.ones((5, 3))), mx.array([-np.inf, 0, 0, 0, 0])))
        require_finite(good)
        stats = lens_stats(mx.ones((2, 4, 3)) * mx.array([[[1.0, 1.0, value]]]), head)
        with pytest.raises(ValueError, match="NaN or infinite for this input"):
            require_finite(stats)
