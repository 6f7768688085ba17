"""The tutorial's notebook runs from its first cell to its last, and shows what its text says."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"
SECONDS = 600  # for one cell: CI's machines are busy


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook, start):
    """Return what the cell whose source has `start` has printed or shown as text."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and start in cell.source]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_every_cell_runs_and_warns_of_nothing(executed):
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_the_pictures_are_there(executed):
    pictures = [output for cell in executed.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 5


def test_the_tuned_lens_is_better_in_every_layer_but_the_last(executed):
    gained = [int(percent) for percent in re.findall(r"nats gained, (-?\d+) %", printed(executed, "nats gained"))]
    assert len(gained) == 7
    assert min(gained) > 20


def test_the_saved_lens_is_the_same(executed):
    assert printed(executed, "load_lens").strip().endswith("True")


def test_the_kl_by_hand_is_the_one_that_evaluate_reports(executed):
    by_hand, measured = map(float, re.findall(r"(\d\.\d+) (?:by hand|from)", printed(executed, "by_hand =")))
    assert by_hand == pytest.approx(measured, rel=1e-3)


def test_fast_is_the_best_of_the_recipes_compared(executed):
    means = dict(re.findall(r"^(.+?) +mean KL (\S+) nats", printed(executed, "lenses = {"), flags=re.MULTILINE))
    assert min(means, key=lambda name: float(means[name])) == "fast"


def test_the_committed_notebook_has_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 1, "write them with: jupyter nbconvert --to notebook --execute --inplace"
