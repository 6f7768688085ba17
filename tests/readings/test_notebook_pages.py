"""Readings, trajectories and comparisons show themselves in notebooks as the viewer's page."""

import html
import json
import re

import pytest


def shown(thing):
    """Return the document of the page in a thing's HTML."""
    source = html.unescape(re.search(r'srcdoc="([^"]*)"', thing._repr_html_())[1])
    return json.loads(re.search(r'id="document">(.*?)</script>', source, re.DOTALL)[1])


@pytest.fixture
def trajectory(tiny):
    return tiny.trajectory([3, 1, 4, 1, 5], top_k=4)


def test_a_trajectory(trajectory):
    document = shown(trajectory)
    assert document["texts"] == [{"name": "A", "trajectories": [trajectory.to_json(compact=True)]}]
    assert document["live"] is None


def test_a_reading_is_its_trajectory(tiny):
    reading = tiny.read([3, 1, 4], top_k=2)
    assert shown(reading)["texts"][0]["trajectories"] == [reading.trajectory.to_json(compact=True)]


def test_two_lenses_are_one_text_with_the_first_one_on_top(tiny, trajectory):
    other = tiny.trajectory([3, 1, 4, 1, 5], lambda hidden, layer: 0.5 * hidden, top_k=4)
    document = shown(other.compare(trajectory))
    ((text),) = document["texts"]
    assert [t["lens"]["name"] for t in text["trajectories"]] == [trajectory.lens, other.lens]
    (comparison,) = document["comparisons"]
    assert comparison["of"] == [[0, 1], [0, 0]]
    assert comparison["a"] is None


def test_two_texts_stand_side_by_side(tiny, trajectory):
    document = shown(trajectory.compare(tiny.trajectory([2, 7, 1, 8, 2], top_k=4)))
    assert [text["name"] for text in document["texts"]] == ["A", "B"]
    assert document["comparisons"][0]["of"] == [[0, 0], [1, 0]]


def test_neighboring_layers_are_colors_of_their_trajectory(trajectory):
    document = shown(trajectory.compare_layers())
    assert document["texts"] == shown(trajectory)["texts"]
    (comparison,) = document["comparisons"]
    assert (comparison["of"], comparison["a"]) == ([[0, 0], [0, 0]], None)
    assert document["statistic"] == "layers:js"
