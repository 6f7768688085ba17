"""The public names of metalens.ops: their types can be read, importing them is cheap, and former names still work."""

import inspect
import subprocess
import sys
import typing

import mlx.core as mx
import pytest

from metalens import ops
from metalens.ops import Head, lens_stats
from support import oracle


def callables(value):
    """Yield a public object and, for a class, its own public methods and properties."""
    yield value
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        if not name.startswith("_") or name in ("__init__", "__call__"):
            if isinstance(member, property):
                yield member.fget
            elif isinstance(member, classmethod | staticmethod):
                yield member.__func__
            elif inspect.isfunction(member):
                yield member


@pytest.mark.parametrize("name", ops.__all__)
def test_type_hints_can_be_read(name):
    for value in callables(getattr(ops, name)):
        hints = typing.get_type_hints(value)
        if inspect.isfunction(value):
            parameters = set(inspect.signature(value).parameters) - {"self", "cls"}
            assert parameters <= set(hints), value


@pytest.mark.parametrize("name", ops.__all__)
def test_everything_public_has_a_docstring(name):
    for value in callables(getattr(ops, name)):
        assert value.__name__ == "__init__" or inspect.getdoc(value), value


def test_no_module_has_the_name_of_a_function():
    modules = {name for name, value in vars(ops).items() if inspect.ismodule(value)}
    assert {"dispatch", "kl", "metal"} <= modules
    assert not modules & set(ops.__all__)


def test_importing_the_operations_loads_no_library_that_is_slow_to_import():
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import metalens.ops"], capture_output=True, text=True, check=True, timeout=120)
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert {"mlx", "metalens"} <= loaded
    assert not loaded & {"mlx_lm", "transformers", "matplotlib", "datasets", "torch"}


def test_the_extension_is_loaded_by_the_first_operation(run_python):
    script = """
import sys
import metalens.ops as ops
import mlx.core as mx
mx.set_default_device(mx.cpu)
x, w = mx.zeros((1, 64)), ops.Weight(mx.zeros((3, 64)))
with ops.use_backend("reference"):
    ops.linear(x, w)
print("metalens._ext" in sys.modules)
ops.linear(x, w)
print("metalens._ext" in sys.modules)
"""
    assert run_python(script).split() == ["False", "True"]


# ---------------------------------------------------------------------- former names


def test_k_is_the_former_name_of_top_k(rng):
    n, head = oracle.random_array(rng, 1, 3, 64), Head(oracle.random_weight(rng, 131, 64))
    with pytest.warns(DeprecationWarning, match=r"k=\) is now top_k="):
        former = lens_stats(n, head, k=4)
    assert mx.array_equal(former.top_ids, lens_stats(n, head, top_k=4).top_ids)
    assert former.top_ids.shape == (1, 3, 4)
    with pytest.raises(TypeError, match="Pass top_k only"):
        lens_stats(n, head, 3, k=4)
    with pytest.warns(DeprecationWarning, match="top_k="), pytest.raises(ValueError, match="top_k must be from 1 to 131"):
        lens_stats(n, head, k=0)
