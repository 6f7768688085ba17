"""Pictures of trajectories and comparisons, small and large, by matplotlib and by plotly."""

import sys
import warnings

import numpy as np
import pytest

from metalens import InterpretableModel, Trajectory
from metalens.readings import DIVERGENCES, STATISTICS
from metalens.readings.heat_map import in_visual_order, save_figure
from metalens.readings.trajectory_map import contents_of, map_figure
from support.mocks import MockModel, WordTokenizer, random_lens

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def trajectory():
    model = InterpretableModel(MockModel(), WordTokenizer())
    return model.trajectory(IDS, random_lens(), embedding=True, top_k=3, anti_targets=[7, -1, 8, 9, 10])


@pytest.fixture(scope="module")
def large():
    """80 layers of 1000 tokens, from a document: no model has to run."""
    model = InterpretableModel(MockModel(), WordTokenizer())
    small = model.trajectory(np.random.default_rng(0).integers(0, 100, 1000).tolist(), top_k=1)
    rows = np.arange(80) % 3
    arrays = {name: getattr(small, name)[rows] for name in ("lse", "entropy", "max_probability", "top_ids", "top_logits", "kl", "rank")}
    return Trajectory(**{**vars(small), **arrays, "layers": tuple(range(80)), "num_layers": 80, "source": None})


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_as_a_small_map(trajectory, statistic, tmp_path):
    figure = trajectory.plot(statistic, "a $title$")
    axes, bar = figure.axes
    values = np.concatenate([getattr(trajectory, statistic), getattr(trajectory.model, statistic)]).astype(float)
    values[(statistic == "rank") & (values < 0)] = np.nan
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), np.where(np.isfinite(values), values, np.nan))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embedding*", "layer 0", "layer 1", "layer 2", "model"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["w3", "w1", "w4", "w1", "w5"]
    assert [text.get_text() for text in axes.texts[:5]] == [trajectory.texts[int(i)] for i in trajectory.top_ids[0, :, 0]]
    label, unit = STATISTICS[statistic]
    assert bar.get_ylabel() == (f"{label} ({unit})" if unit else label)
    assert axes.get_title().startswith("a $title$ (*: no translator")
    save_figure(figure, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_the_prediction_depth_is_a_line_between_rows(trajectory):
    assert len(trajectory.plot("kl").axes[0].patches) == 0
    figure = trajectory.plot("kl", "a title", depth=True)
    depth = trajectory.prediction_depth
    assert len(set(depth)) > 1
    for line in figure.axes[0].patches:
        values, edges, _ = line.get_data()
        np.testing.assert_array_equal(values, depth - 0.5)
        np.testing.assert_array_equal(edges, [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5])
    assert len(figure.axes[0].patches) == 2  # dark on a light ground
    assert "(line: prediction depth" in " ".join(figure.axes[0].get_title().split())
    figure.canvas.draw()


def test_the_prediction_depth_is_a_line_in_plotly(trajectory):
    need_plotly()
    assert len(trajectory.figure("kl").data) == 1
    _, line = trajectory.figure("kl", depth=True).data
    np.testing.assert_array_equal(line.y[:-1], trajectory.prediction_depth - 0.5)
    assert (line.y[-1], line.x[0], line.x[-1], line.line.shape) == (line.y[-2], -0.5, 4.5, "hv")


def test_the_embedding_does_not_set_the_scale(trajectory):
    values = np.ones((5, 5))
    values[0], values[1:, 0] = 40, 3
    figure = map_figure(contents_of(trajectory, "kl")._replace(values=values))
    assert figure.axes[0].images[0].get_clim() == (1, 3)
    assert figure.axes[0].images[0].colorbar.extend == "max"
    alone = map_figure(contents_of(trajectory.select(layers=["embedding"]), "kl")._replace(values=np.array([[1.0] * 5, [2.0] * 5])))
    assert alone.axes[0].images[0].colorbar.extend == "neither"


def test_signed_values_have_zero_in_the_middle(trajectory):
    low, high = trajectory.plot("log_prob_difference").axes[0].images[0].get_clim()
    assert low == -high < 0


@pytest.mark.parametrize("statistic", ["entropy", "rank"])
def test_a_large_map_names_some_tokens_and_says_so(large, statistic, tmp_path):
    figure = large.plot(statistic)
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (81, 1000)
    assert not axes.texts
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert len(names) == 40
    assert names[1] == f"25 {large.tokens[25]}"
    assert axes.get_xlabel() == "token read (every 25th of 1000 is named)"
    assert len(axes.get_yticklabels()) <= 41
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "map.png")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_comparisons(trajectory, divergence):
    found = trajectory.compare_layers()
    axes = found.plot(divergence, "t").axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), getattr(found, divergence))
    assert [label.get_text() for label in axes.get_yticklabels()] == list(found.labels)


def test_statistics_that_are_not_there(trajectory):
    with pytest.raises(ValueError, match="'x' is no statistic; there are entropy"):
        trajectory.plot("x")
    plain = InterpretableModel(MockModel(), WordTokenizer()).trajectory(IDS, compare=False)
    with pytest.raises(ValueError, match="'kl' was not computed for this trajectory"):
        plain.plot("kl")
    with pytest.raises(ValueError, match="'entropy' is no divergence; there are kl"):
        trajectory.compare_layers().plot("entropy")


def test_values_that_are_infinite_or_missing_everywhere(trajectory):
    for value in (np.nan, np.inf):
        contents = contents_of(trajectory, "entropy")._replace(values=np.full((5, 5), value))
        map_figure(contents).canvas.draw()


def test_right_to_left_runs_are_reversed_for_matplotlib():
    assert in_visual_order("\u05d0\u05d1 a \u05d2") == "\u05d1\u05d0 a \u05d2"
    assert in_visual_order("\u05d0\u05b7\u05d1") == "\u05d1\u05d0\u05b7"
    assert in_visual_order("abc") == "abc"


# ------------------------------------------------------------------ plotly


def need_plotly():
    pytest.importorskip("plotly", reason="plotly is optional and not installed: pip install 'metalens[plotly]'")


def test_plotly_figures_have_the_tokens_in_their_hover_text(trajectory):
    need_plotly()
    for statistic in STATISTICS:
        figure = trajectory.figure(statistic, "a title")
        heat_map = figure.data[0]
        assert np.array(heat_map.z).shape == (5, 5)
        assert list(figure.layout.yaxis.ticktext) == ["embedding*", "layer 0", "layer 1", "layer 2", "model"]
        best = trajectory.texts[int(trajectory.top_ids[2, 3, 0])]
        share = 100 * trajectory.top_probabilities[2, 3, 0]
        assert f"<br>{share:5.1f} %  {best}" in heat_map.customdata[2][3]
        assert "position 3, after <b>w1</b>" in heat_map.customdata[2][3]
    assert figure.to_html(include_plotlyjs=False)


def test_plotly_of_comparisons_and_large_maps(trajectory, large):
    need_plotly()
    found = trajectory.compare_layers().figure("js")
    assert "<b>layer</b>" in found.data[0].customdata[0][0]
    assert "<b>next layer</b>" in found.data[0].customdata[0][0]
    map_of_many = large.figure("kl")
    assert map_of_many.data[0].text is None
    assert len(map_of_many.layout.xaxis.tickvals) <= 60
    assert map_of_many.layout.width <= 2000


def test_hostile_tokens_are_escaped_in_plotly(trajectory):
    need_plotly()
    hostile = Trajectory(**{**vars(trajectory), "texts": dict.fromkeys(trajectory.texts, "<img src=x onerror=alert(1)>")})
    figure = hostile.figure("kl")
    assert "<img" not in str(figure.data[0].customdata) + str(figure.data[0].text) + str(figure.layout.xaxis.ticktext)


def test_without_plotly(trajectory, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"pip install 'metalens\[plotly\]'"):
        trajectory.figure("kl")
