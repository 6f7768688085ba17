import hashlib
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest

import metalens
from metalens import _extension, use_backend
from metalens.ops import linear
from support import oracle


@pytest.fixture
def fresh():
    """Forget what was found and warned about, before the test and after it."""
    for cached in (_extension.find, _extension._warn_once):
        cached.cache_clear()
    yield
    for cached in (_extension.find, _extension._warn_once):
        cached.cache_clear()


@pytest.fixture
def build_info(monkeypatch, tmp_path, fresh):
    """Return a function that replaces the text of _build_info.json."""

    def write(text):
        file = tmp_path / "_build_info.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(_extension, "BUILD_INFO", file)

    return write


def warnings_of_two_calls(rng):
    """Run two products on the default backend, check them, and return the messages of the warnings they gave."""
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    with warnings.catch_warnings(record=True) as caught, use_backend("auto"):
        warnings.simplefilter("always")
        results = [linear(x, w), linear(x, w, transpose=True)]
    for y in results:
        oracle.assert_product(y, x, w, epsilon=1e-5)  # plain MLX's sums are a little less exact
    assert all(w.category is RuntimeWarning for w in caught)
    return [str(w.message) for w in caught]


def test_the_installed_package_has_a_working_extension(rng, fresh):
    extension, reason = _extension.find()
    assert (extension is not None, reason) == (True, "")
    assert extension is sys.modules["metalens._ext"]
    assert extension.num_threads() >= 1
    assert extension.isa() in extension.available_isas().split()
    assert warnings_of_two_calls(rng) == []


def test_built_for_another_mlx(rng, build_info):
    build_info(json.dumps({"mlx": "0.0.1"}))
    (message,) = warnings_of_two_calls(rng)
    assert re.search(rf"built for mlx 0\.0\.1, and mlx {re.escape(mx.__version__)} is installed", message)
    assert "Reinstall" in message


def test_an_extension_for_another_mlx_is_not_even_loaded(monkeypatch, build_info):
    # Loading it may crash the process, so the versions must be compared first.
    build_info(json.dumps({"mlx": "0.0.1"}))
    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert _extension.find()[0] is None


def test_not_built(rng, monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(_extension, "BUILD_INFO", tmp_path / "none.json")
    (message,) = warnings_of_two_calls(rng)
    assert "not built" in message


@pytest.mark.parametrize("text", ["", "{", "{}", b"\xff\xfe", "[]", "null", "3", '"0.32.4"'])
def test_damaged_build_information(rng, build_info, text):
    build_info(text)
    (message,) = warnings_of_two_calls(rng)
    assert "damaged" in message


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN3mlx"), RuntimeError("no such instruction set")])
def test_an_extension_that_does_not_load(rng, monkeypatch, fresh, error):
    def fail(name):
        raise error

    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    (message,) = warnings_of_two_calls(rng)
    assert f"could not be loaded: {error}" in message


def test_an_extension_that_does_not_know_mlx_arrays(rng, monkeypatch, fresh):
    # An extension with other nanobind internals imports, but every call that takes an array is a TypeError.
    class Foreign:
        @staticmethod
        def matmul(*args):
            raise TypeError("incompatible function arguments")

    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: Foreign)
    (message,) = warnings_of_two_calls(rng)
    assert "incompatible function arguments" in message


def test_loading_it_again_after_it_was_missing(monkeypatch, tmp_path, fresh):
    # The search runs once per process: the file is not read at every call.
    assert _extension.load() is not None
    monkeypatch.setattr(_extension, "BUILD_INFO", tmp_path / "none.json")
    assert _extension.load() is not None


TWO_PRODUCTS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import metalens
    import numpy as np
    from support import oracle
    from metalens.ops import linear
    rng = np.random.default_rng(0)
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    for y in (linear(x, w), linear(x, w)):
        oracle.assert_product(y, x, w, epsilon=1e-5)
print(*(f"{w.category.__name__}: {w.message}" for w in caught), sep="\\n")
"""


ONE_PRODUCT = """
import metalens
import mlx.core as mx
from metalens.ops import Weight, linear
try:
    mx.eval(linear(mx.ones((2, 3)), Weight(mx.ones((4, 3)))))
except metalens.utils.errors.InvalidValueError as error:
    print(error)
"""
IMPOSSIBLE = [("METALENS_ISA", "sse9"), ("METALENS_NUM_THREADS", "abc"), ("METALENS_NUM_THREADS", "0"), ("METALENS_NUM_THREADS", "-1")]


@pytest.mark.parametrize(("variable", "value"), IMPOSSIBLE)
def test_an_impossible_setting_is_an_error_and_not_a_slow_run(run_python, variable, value):
    (line,) = run_python(ONE_PRODUCT, **{variable: value}).splitlines()
    assert line.startswith(f"{variable}={value} ")
    assert line.endswith("Change or remove the variable.")
    assert "Reinstall" not in line
    assert ".." not in line


def test_an_impossible_setting_matters_at_the_first_operation_alone(run_python):
    imported = TWO_PRODUCTS[: TWO_PRODUCTS.index("    import numpy")] + TWO_PRODUCTS[TWO_PRODUCTS.index("print(") :]
    assert run_python(imported, METALENS_ISA="sse9").strip() == ""
    assert run_python(TWO_PRODUCTS, METALENS_ISA="sse9", METALENS_BACKEND="reference").strip() == ""
    assert run_python(TWO_PRODUCTS).strip() == ""


def test_the_warning_points_at_the_caller_of_the_operation(rng, monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(_extension, "BUILD_INFO", tmp_path / "none.json")
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    with use_backend("auto"), pytest.warns(RuntimeWarning, match="not built") as caught:
        linear(x, w)
    assert [warning.filename for warning in caught] == [__file__]


def test_empty_settings_are_no_settings(run_python):
    assert run_python(TWO_PRODUCTS, METALENS_ISA="", METALENS_NUM_THREADS="", METALENS_BACKEND="").strip() == ""


def test_the_package_works_where_the_extension_is_missing(run_python, tmp_path):
    # Copy the package as plain Python: no _ext, no _build_info.json.
    package = Path(metalens.__file__).parent
    shutil.copytree(package, tmp_path / "metalens", ignore=shutil.ignore_patterns("_ext.*", "_build_info.json", "__pycache__"))
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{TWO_PRODUCTS}\nimport metalens\nassert metalens.__file__.startswith({str(tmp_path)!r})"
    )
    (line,) = run_python(script).splitlines()
    assert "not built" in line


# ------------------------------------------------------------------ a damaged file


@pytest.fixture
def installed(tmp_path):
    """Return a copy of the package whose _build_info.json describes its extension, as an installation has it."""
    package = Path(metalens.__file__).parent
    shutil.copytree(package, tmp_path / "metalens", ignore=shutil.ignore_patterns("__pycache__"))
    (extension,) = (tmp_path / "metalens").glob("_ext*.so")
    content = extension.read_bytes()
    about = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "metalens" / "_build_info.json").write_text(json.dumps({"mlx": mx.__version__, "extension": about}))
    return extension


def output_of(run_python, installed):
    return run_python(f"import sys; sys.path.insert(0, {str(installed.parent.parent)!r})\n{TWO_PRODUCTS}").strip()


def test_a_whole_extension_is_used(run_python, installed):
    assert output_of(run_python, installed) == ""


def cut(file):
    file.write_bytes(file.read_bytes()[:200_000])


def flip(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(byte ^ 0xFF for byte in content[middle : middle + 400])
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_extension_is_not_loaded(run_python, installed, damage):
    damage(installed)
    (line,) = output_of(run_python, installed).splitlines()
    assert f"{installed.name} is damaged: it is not the file that was built" in line
    assert "Reinstall" in line


def test_an_extension_that_is_gone(run_python, installed):
    installed.unlink()
    assert "its file is missing" in output_of(run_python, installed)


def test_build_information_that_is_a_folder(rng, monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(_extension, "BUILD_INFO", tmp_path)
    (message,) = warnings_of_two_calls(rng)
    assert "can't be read" in message
