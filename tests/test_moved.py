"""Names of version 0.1.0 still work, with a warning that says where they went."""

import importlib
import sys

import pytest

import metalens
from metalens import _moved


@pytest.fixture(autouse=True)
def _forgotten():
    """Each test imports the old names for the first time, and leaves none behind."""
    before = dict(vars(metalens))
    yield
    for name in [name for name in sys.modules if name in _moved.MODULES or name.rpartition(".")[0] in _moved.MODULES]:
        del sys.modules[name]
    for name in set(vars(metalens)) - set(before):
        delattr(metalens, name)
    vars(metalens).update(before)


@pytest.mark.parametrize(("old", "new"), _moved.MODULES.items(), ids=list(_moved.MODULES))
def test_an_old_module_is_the_new_one_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new}".replace(".", r"\.")):
        module = importlib.import_module(old)
    there = importlib.import_module(new)
    for name in [name for name in vars(there) if not name.startswith("_")]:
        assert getattr(module, name) is getattr(there, name)


def test_old_names_of_classes():
    with pytest.warns(DeprecationWarning, match="has moved to"):
        from metalens.unembed import NoUnembed
    from metalens.models.unembed import UnembedError

    assert NoUnembed is UnembedError
    with pytest.warns(DeprecationWarning, match="has moved to"):
        from metalens.stream import NoStream, StreamSource
    from metalens.models.capture import ResidualCapture, ResidualStreamError

    assert (StreamSource, NoStream) == (ResidualCapture, ResidualStreamError)


def test_names_of_a_module_that_was_split():
    with pytest.warns(DeprecationWarning, match=r"metalens\.lens has moved"):
        from metalens.lens import TunedLens, lens_files, origin_of
    with pytest.warns(DeprecationWarning, match=r"metalens\.readout has moved"):
        from metalens.readout import Reading, lens_rows, translated
    from metalens.lenses import lens, lens_file, provenance, translators
    from metalens.readings import reading, rows

    assert (TunedLens, lens_files, origin_of) == (lens.TunedLens, lens_file.lens_files, provenance.provenance_of)
    assert (Reading, lens_rows, translated) == (reading.Reading, rows.lens_rows, translators.translated)


def test_modules_within_an_old_package():
    with pytest.warns(DeprecationWarning, match="has moved to"):
        from metalens.metal.kernel import Kernel
    from metalens.ops.metal import kernel

    assert Kernel is kernel.Kernel


def test_an_old_module_does_not_hide_the_function_of_its_name():
    with pytest.warns(DeprecationWarning, match="has moved to"):
        import metalens.evaluate
    from metalens.evaluation.evaluator import evaluate

    assert metalens.evaluate.evaluate is evaluate
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        metalens.evaluate()


def test_a_name_that_never_was():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("metalens.nothing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = metalens.nothing


def test_every_old_name_of_a_class_is_somewhere():
    places = [importlib.import_module(new) for new in {*_moved.MODULES.values(), *sum(_moved.SPLIT.values(), ())}] + [
        importlib.import_module(f"metalens.training{name}") for name in ("", ".distributed")
    ]
    missing = [new for new in _moved.NAMES.values() if not any(hasattr(place, new) for place in places)]
    assert not missing


def test_names_that_left_their_module():
    with pytest.warns(DeprecationWarning, match="has moved"):
        from metalens.roofline import MODELS, Dimensions
    from metalens.models.facts import KNOWN_MODELS, ModelDimensions

    assert (MODELS, Dimensions) == (KNOWN_MODELS, ModelDimensions)
    with pytest.warns(DeprecationWarning, match=r"ModelDimensions.depth is called hidden_size now"):
        assert KNOWN_MODELS["Llama-3.1-8B-4bit"].depth == 4096
