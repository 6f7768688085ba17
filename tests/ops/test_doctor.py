"""What doctor says of an installation, also of one that is broken."""

import json

import pytest

from metalens import _extension
from metalens.ops import doctor


def test_a_working_installation():
    found = doctor.examine()
    assert found.problems == []
    assert found.native_problem == ""
    assert found.native.instruction_set in found.native.available_instruction_sets
    assert found.native.largest_difference < doctor.TOLERANCE
    assert found.native.threads >= 1
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_without_an_extension(monkeypatch):
    monkeypatch.setattr(_extension, "find", lambda: (None, "it was not built"))
    found = doctor.examine()
    assert found.native is None
    assert found.native_problem == "it was not built"
    assert found.problems == ["The native extension is not used, because it was not built. Reinstall metalens to build it."]


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_kernels_that_compute_something_else(monkeypatch, difference):
    monkeypatch.setattr(doctor, "_compare", lambda: (difference, 10.0))
    (problem,) = doctor.examine().problems
    assert "METALENS_BACKEND=reference" in problem
