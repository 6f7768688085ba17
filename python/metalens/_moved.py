"""Names of version 0.1.0 that have moved. They work for one more release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# {old module: new module}
MODULES = {
    "metalens.accelerate": "metalens.models.acceleration",
    "metalens.architectures": "metalens.models.architectures",
    "metalens.demo": "metalens.cli.demo",
    "metalens.doctor": "metalens.ops.doctor",
    "metalens.evaluate": "metalens.evaluation.evaluator",
    "metalens.lens": "metalens.lenses.lens",
    "metalens.loading": "metalens.models.loading",
    "metalens.metal": "metalens.ops.metal",
    "metalens.model_facts": "metalens.models.facts",
    "metalens.ops.attention": "metalens.ops.sdpa",
    "metalens.ops.backend": "metalens.ops.backends",
    "metalens.ops.lens_kl": "metalens.ops.kl",
    "metalens.ops.lens_stats": "metalens.ops.stats",
    "metalens.ops.linear": "metalens.ops.matmul",
    "metalens.ops.translate_norm": "metalens.ops.translate",
    "metalens.ops.unembed": "metalens.ops.logits",
    "metalens.plan": "metalens.estimate.memory",
    "metalens.plotting": "metalens.readings.heat_map",
    "metalens.readout": "metalens.readings.reading",
    "metalens.report": "metalens.display.tables",
    "metalens.roofline": "metalens.estimate.roofline",
    "metalens.stream": "metalens.models.capture",
    "metalens.support": "metalens.models.support",
    "metalens.tokens": "metalens.models.tokenization",
    "metalens.trace": "metalens.models.trace",
    "metalens.trail": "metalens.models.probe",
    "metalens.training.progress": "metalens.training.callbacks",
    "metalens.translators": "metalens.lenses.translators",
    "metalens.unembed": "metalens.models.unembed",
    "metalens.weight": "metalens.ops.weight",
}

# {old name of a class or function: new name}, in any of these modules
NAMES = {
    "Call": "ModuleCall",
    "Dimensions": "ModelDimensions",
    "GroupLost": "GroupLostError",
    "Listener": "Callback",
    "MODELS": "KNOWN_MODELS",
    "NoStream": "ResidualStreamError",
    "NoUnembed": "UnembedError",
    "NotEnoughData": "NotEnoughDataError",
    "Part": "FoundModule",
    "Parts": "HeadModules",
    "Places": "Overrides",
    "Stream": "HiddenStates",
    "StreamSource": "ResidualCapture",
    "TokenizerMixin": "Tokenization",
    "Trail": "ModuleCalls",
    "TrainingInterrupted": "TrainingInterruptedError",
    "as_it_is": "snapshot",
    "check_origin": "check_provenance",
    "dimensions": "dimensions_of",
    "find_parts": "find_head_modules",
    "follow_calls": "probe_modules",
    "origin_of": "provenance_of",
    "other_methods": "replaced_methods",
    "predictions": "predictions_of",
    "support": "supported_modules",
}

# {old module: more modules that its names are now in}
SPLIT = {
    "metalens.evaluate": ("metalens.evaluation",),
    "metalens.lens": ("metalens.lenses.lens_file", "metalens.lenses.provenance"),
    "metalens.plan": ("metalens.estimate.results", "metalens.display.format"),
    "metalens.readout": ("metalens.readings.rows", "metalens.readings.top_tokens", "metalens.lenses.translators"),
    "metalens.report": ("metalens.display.figures",),
    "metalens.roofline": ("metalens.models.facts", "metalens.estimate.chips"),
    "metalens.translators": ("metalens.lenses.lens_file",),
}


class _Moved(ModuleType):
    """Stands for a module that has moved: looks every name up in the new one."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self.__path__: list[str] = []  # an old package: its modules are looked up too
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        modules = [importlib.import_module(module) for module in (self._new, *SPLIT.get(self.__name__, ()))]
        name = NAMES.get(name, name)
        return getattr(next((module for module in modules if hasattr(module, name)), modules[0]), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function of the same name: importing `metalens.evaluate` must not take `metalens.evaluate` away."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Finder(MetaPathFinder, Loader):
    """Finds the old modules."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for an old module, None for all others."""
        return ModuleSpec(fullname, self, is_package=True) if _new_name(fullname) is not None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the stand-in, with a warning that names the new module."""
        new = _new_name(spec.name)
        assert new is not None
        warnings.warn(f"{spec.name} has moved to {new}; the old name will be removed in the next release.", DeprecationWarning, stacklevel=2)
        return _Moved(spec.name, new)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is complete."""


def _new_name(old: str) -> str | None:
    if old in MODULES:
        return MODULES[old]
    parent, _, name = old.rpartition(".")
    return f"{MODULES[parent]}.{name}" if parent in MODULES else None


def install() -> None:
    """Let Python find the old names, after all that exist."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
