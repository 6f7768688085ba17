"""The notebooks in examples/notebooks run from their first cell to their last, warn of nothing, and show the viewer's page."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = ["explore_a_model", "train_a_lens", "compare_two_prompts"]
SECONDS = 600  # for one cell: CI's machines are busy


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return a function that executes a notebook once and returns it."""
    done = {}

    def execute(name):
        if name not in done:
            notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
            folder = tmp_path_factory.mktemp(name)
            nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
            done[name] = notebook
        return done[name]

    return execute


def printed(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout")


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_the_page(executed, name):
    outputs = [output for cell in executed(name).cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) == 1
    assert pages[0].startswith("<iframe ")


def test_layers_come_closer_to_the_answer(executed):
    distances = [float(kl) for kl in re.findall(r"layer \d +(\d+\.\d+) nats", printed(executed("explore_a_model")))]
    assert len(distances) == 8
    assert distances[-1] == 0
    assert distances[0] > distances[4] > distances[6] > 0


def test_the_trained_lens_is_better_in_every_layer(executed):
    pairs = re.findall(r"logit lens (\d\.\d+) +tuned lens (\d\.\d+)", printed(executed("train_a_lens")))
    assert len(pairs) == 7
    assert all(float(tuned) < float(logit) for logit, tuned in pairs)


def test_two_prompts_differ_from_the_word_on_that_differs(executed):
    text = printed(executed("compare_two_prompts"))
    assert float(re.search(r"before the word: (\S+)", text)[1]) < 1e-4
    assert max(float(value) for value in re.findall(r" (0\.\d\d)", text)) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_has_no_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "a page is large: clear the outputs before you commit"
