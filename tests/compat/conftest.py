import importlib
import sys

import pytest

from support.mocks import MockModel, WordTokenizer
from support.tuned_lens_files import CONFIG

SUBMODULES = ("tuned_lens", "interventions", "core", "core.module_resolver")


@pytest.fixture(autouse=True)
def aliases(monkeypatch):
    """Put the compatibility modules in mlxterp's place, as the package's documentation says."""
    monkeypatch.setitem(sys.modules, "mlxterp", importlib.import_module("metalens.compat.mlxterp"))
    for name in SUBMODULES:
        monkeypatch.setitem(sys.modules, f"mlxterp.{name}", importlib.import_module(f"metalens.compat.mlxterp.{name}"))


@pytest.fixture
def mlxterp():
    return importlib.import_module("mlxterp")


@pytest.fixture
def tuned_lens():
    return importlib.import_module("mlxterp.tuned_lens")


@pytest.fixture
def resolver():
    return importlib.import_module("mlxterp.core.module_resolver")


@pytest.fixture
def model(mlxterp):
    return mlxterp.InterpretableModel(MockModel(), WordTokenizer())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a config.json; nothing that a test's file does may leave a mark in it."""
    (tmp_path / "config.json").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path
