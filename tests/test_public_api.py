"""Everything public has type hints that tools (editors, documentation generators, pydantic) can evaluate."""

import functools
import importlib
import inspect
import pkgutil
import typing

import pytest

import metalens


def modules():
    """The public modules of the package. Modules for another package's users have its names, and the extension has no hints.

    The bridge to lm-evaluation-harness is one of the harness's classes, so it can't be imported without the harness.
    """
    found = [info.name for info in pkgutil.walk_packages(metalens.__path__, "metalens.")]
    return sorted(name for name in found if name != "metalens.compat.lm_eval" and not any(part.startswith("_") for part in name.split(".")))


def functions_of(name, value):
    """Yield (name, function or class) for a public function, or for a class and its methods and properties."""
    if inspect.isclass(value):
        yield name, value
        for attribute, member in vars(value).items():
            if attribute.startswith("_") and attribute not in ("__init__", "__call__"):
                continue
            plain = getattr(member, "__func__", None) or getattr(member, "fget", None) or getattr(member, "func", None) or member
            if inspect.isfunction(plain):
                yield f"{name}.{attribute}", plain
    elif inspect.isfunction(inspect.unwrap(value)):
        yield name, value


def public_objects():
    for module_name in modules():
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name:
                yield from functions_of(f"{module_name}.{name}", value)
    for name in metalens.__all__:
        yield from functions_of(f"metalens.{name}", getattr(metalens, name))


@functools.cache
def by_module():
    found = {}
    for name, value in public_objects():
        found.setdefault(value.__module__, []).append((name, value))
    return found


@pytest.mark.parametrize("module", ["metalens", *modules()])
def test_type_hints_can_be_evaluated(module):
    failures = {}
    for name, value in by_module().get(module, []):
        try:
            typing.get_type_hints(value)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    assert not failures


def test_public_names_are_found():
    names = {name for objects in by_module().values() for name, _ in objects}
    assert {"metalens.accelerate", "metalens.InterpretableModel.trace", "metalens.models.tokenization.Tokenization.ids"} <= names
    assert {"metalens.models.language_model.LanguageModel.unembed", "metalens.models.unembed.Unembed.from_model"} <= names


def test_every_public_name_at_the_top_is_documented():
    assert all(getattr(metalens, name).__doc__ for name in metalens.__all__)


def test_no_module_is_hidden_by_a_function_of_its_name():
    """`import metalens.x` gives the module, and `metalens.x` never something else: debuggers, reload and patches by name rely on it."""
    hidden = []
    for name in modules():
        module = importlib.import_module(name)
        parent, _, own = name.rpartition(".")
        if getattr(importlib.import_module(parent), own) is not module:
            hidden.append(name)
    assert not hidden
