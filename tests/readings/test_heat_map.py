import warnings
from unittest import mock

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from metalens.readings.heat_map import lens_figure, save_figure
from metalens.utils.outputs import NotOursError
from metalens.utils.token_display import MAX_WIDTH


def result_of(layers, tokens):
    return {layer: [[(t, 1.0, f" w{layer}.{t}")] for t in range(tokens)] for layer in layers}


def cell_texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def test_deepest_layer_is_on_top_whatever_the_order_given():
    figure = lens_figure(result_of([4, 0], 2), ["a", "b"], np.array([[0.4, 0.5], [0.0, 0.1]]), "p")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 4"]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.0, 0.1], [0.4, 0.5]])
    assert cell_texts(figure) == ["␣w0.0", "␣w0.1", "␣w4.0", "␣w4.1"]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # row 0 at the bottom


def test_the_models_own_answer_stands_above_all_layers():
    figure = lens_figure(result_of([0, 1], 2), ["a", "b"], np.zeros((2, 2)), "p", model_row=([" yes", " no"], [0.7, 0.8]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][-1] == "model"
    assert cell_texts(figure)[-2:] == ["␣yes", "␣no"]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array()[-1], [0.7, 0.8])


def test_only_the_last_tokens_are_shown():
    figure = lens_figure(result_of([0], 40), [f"t{i}" for i in range(40)], np.arange(40.0)[None], "p", max_display_tokens=5)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["t35", "t36", "t37", "t38", "t39"]
    assert cell_texts(figure)[0] == "␣w0.35"
    assert figure.axes[0].get_xlabel() == "token read (the last 5 of 40)"


def test_ink_contrasts_with_the_cell():
    figure = lens_figure(result_of([0], 2), ["a", "b"], np.array([[0.0, 1.0]]), "p", cmap="gray", limits=(0, 1))
    assert [t.get_color() for t in figure.axes[0].texts] == ["white", "black"]


def test_limits_fix_the_color_scale():
    figure = lens_figure(result_of([0], 2), ["a", "b"], np.array([[0.2, 0.3]]), "p", limits=(0, 1))
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_characters_without_a_glyph_are_spelled_and_cause_no_warning(tmp_path):
    """A picture of boxes would show different tokens alike."""
    tokens = ["a", "屿", "屿岛", "\U0001f9ff", "é…"]  # in DejaVu Sans are the first and the last
    with warnings.catch_warnings(), mock.patch("metalens.readings.heat_map.FONTS", ("DejaVu Sans",)):
        warnings.simplefilter("error")
        figure = lens_figure({0: [[(1, 1.0, token)] for token in tokens]}, tokens, np.zeros((1, 5)), "p")
        save_figure(figure, tmp_path / "out.png")
    expected = ["a", "U+5C7F", "U+5C7FU+5C9B", "U+1F9FF", "é…"]
    assert cell_texts(figure) == expected
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == expected
    assert all(len(text) <= MAX_WIDTH for text in expected)


def test_dollar_signs_and_underscores_are_drawn_as_they_are(tmp_path):
    # matplotlib reads a pair of dollar signs as mathematics, and fails on what is none.
    figure = lens_figure({0: [[(1, 1.0, "$a_^$")]]}, ["$x$"], np.zeros((1, 1)), "p")
    save_figure(figure, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="one value per layer and token"):
        lens_figure(result_of([0], 2), ["a", "b"], np.zeros((2, 2)), "p")
    with pytest.raises(ValueError, match="nothing to plot"):
        lens_figure({}, [], np.zeros((0, 0)), "p")


def test_global_settings_of_matplotlib_stay_as_they_were():
    before = dict(mpl.rcParams)
    lens_figure(result_of([0], 1), ["a"], np.zeros((1, 1)), "p", font_family="DejaVu Serif")
    assert dict(mpl.rcParams) == before


def test_a_file_that_is_no_picture_is_not_replaced(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("precious")
    with pytest.raises(NotOursError, match=r"picture\.png exists and is not a picture"):
        save_figure(Figure(), path)
    assert path.read_text() == "precious"
    for options in ({"force": True}, {}):  # a picture replaces a picture
        save_figure(Figure(), path, **options)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_suffix_that_is_no_picture_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="suffix must be one of"):
        save_figure(Figure(), tmp_path / "picture.doc")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_only_when_something_is_drawn(run_python):
    script = "import sys, metalens.readings.heat_map, metalens.readings, metalens.evaluation, metalens.lenses.provenance, metalens.compat"
    assert run_python(f"{script}; print('matplotlib' in sys.modules, 'pandas' in sys.modules)").split() == ["False", "False"]
