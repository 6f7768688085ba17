"""Every model of mlx-lm is right, or is refused with a reason, as the table of `metalens models` says."""

import json
from importlib.metadata import version

import pytest
from click.testing import CliRunner

from metalens.cli import main
from metalens.models import support
from metalens.models.support import NOT_RUN, modules
from zoo import CONFIGS, module_of
from zoo.verdict import examine


@pytest.mark.parametrize("label", sorted(CONFIGS))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_is_read_right_or_refused_as_the_table_says(label):
    _, table = support.tested()
    assert examine(label).as_dict() == table[label], "if this is right, run python tools/models_page.py --examine"


def test_the_table_is_of_this_zoo():
    assert set(support.tested()[1]) == set(CONFIGS)


def test_every_module_of_mlx_lm_is_in_the_zoo():
    """New models of a newer mlx-lm fail here, and `metalens models` lists them as untested, until the zoo has them."""
    missing = set(modules()) - {module_of(label) for label in CONFIGS} - set(NOT_RUN)
    assert not missing


def test_a_new_module_is_untested(monkeypatch):
    monkeypatch.setattr(support, "modules", lambda: ["llama", "llama9"])
    assert {m.name: m.status for m in support.supported_modules()} == {"llama": "right", "llama9": "untested"}


def test_most_are_right():
    found = support.supported_modules()
    assert len(found) == len(modules())
    assert sum(m.status == "right" for m in found) >= 0.9 * len(found)
    assert all(m.reason for m in found if m.status != "right")


def test_the_command_prints_the_table():
    done = CliRunner().invoke(main, ["models"])
    assert done.exit_code == 0
    assert "phi3small" in done.stdout
    assert "minus infinity" in " ".join(done.stdout.split())
    assert "right" in done.stderr
    done = CliRunner().invoke(main, ["models", "--json"])
    found = json.loads(done.stdout)
    assert {m["name"] for m in found["models"]} == set(modules())
    assert found["installed"] == found["tested with mlx-lm"] == version("mlx-lm")


def test_remarks_name_the_variants_that_mlx_lm_itself_cant_run():
    fine, broken = (
        {"float32": "right", "quantized": "right", "bfloat16": "right"},
        {"float32": "right", "quantized": "mlx-lm: X", "bfloat16": "right"},
    )
    assert support.remark(support.Module("a", "right", {"a": fine, "a-tied": broken})) == "quantized (a-tied): mlx-lm: X"
    assert support.remark(support.Module("a", "right", {"a": broken})) == "quantized: mlx-lm: X"
    assert support.remark(support.Module("a", "refused", {}, "because")) == "because"
