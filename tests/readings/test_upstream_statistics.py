"""Every statistic of a trajectory equals tuned-lens's, and float64 NumPy's, to 1e-5 on models that both libraries load."""

import json

import pytest

from support import upstream_statistics as upstream

TOLERANCE = 1e-5  # of a value, or absolute below 1


@pytest.fixture(scope="module", params=upstream.CONFIGS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    upstream.save(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return upstream.of_metalens(folder)


@pytest.fixture(scope="module")
def recorded(folder):
    """The numbers that tuned-lens computed once; `make_upstream_statistics.py` beside them has the command."""
    (name,) = [name for name in upstream.CONFIGS if folder.name.startswith(name)]
    return json.loads(upstream.RECORDED.read_text())["statistics"][name]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for group, statistics in expected.items():
        assert found[group].keys() == statistics.keys()
        for name, values in statistics.items():
            assert upstream.error(found[group][name], values) <= TOLERANCE, (group, name)


def test_every_statistic_is_compared(found):
    assert found.keys() == {*upstream.LENSES, "comparison"}
    for lens in upstream.LENSES:
        assert found[lens].keys() == upstream.UPSTREAM.keys()
    assert found["comparison"].keys() == upstream.UPSTREAM_COMPARISON.keys()


def test_equal_to_float64_numpy(folder, found):
    assert_equal(found, upstream.of_numpy(folder))


def test_equal_to_the_recorded_numbers_of_tuned_lens(found, recorded):
    assert_equal(found, recorded)


def test_equal_to_tuned_lens_itself(folder, found, recorded):
    pytest.importorskip("tuned_lens", reason="tuned-lens is not installed: pip install torch==2.13.0 transformers tuned-lens")
    live = upstream.of_tuned_lens(folder)
    assert_equal(found, live)
    assert_equal(live, recorded)
