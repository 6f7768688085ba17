import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.lenses.lens import LogitLens
from metalens.readings.rows import lens_rows, select_layers, select_position


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
