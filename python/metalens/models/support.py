"""List the models of mlx-lm that a lens can read.

The table `assets/models.json` holds the results of the tests, which examine a tiny model of every architecture (tests/zoo). An installed
mlx-lm may have more models than the table.
"""

from __future__ import annotations

import json
import pkgutil
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).parents[1] / "assets" / "models.json"

RIGHT = "right"

# {module: why the tests cannot run it}. The tests run on a CPU under Linux.
NOT_RUN = {
    "bitnet": "its linear layers are Metal kernels without a CPU version",
    "muse_spark": "its attention, norms and experts are Metal kernels without a CPU version",
    "olmo": "it needs the package hf_olmo, and its mask fails for more than one token",
}


@dataclass(frozen=True)
class Module:
    """The results of the tests for one module of mlx-lm.

    Attributes:
        name: the name in mlx_lm.models, in most cases the model_type of a config.json.
        status: "right", "refused", "not run", "untested", or "partly" if some variants are refused.
        variants: {label: {"float32": result, "quantized": result, "bfloat16": result}}; a result is "right" or the reason why it is not.
        reason: why the status is not "right"; "" if it is.
    """

    name: str
    status: str
    variants: dict[str, dict[str, str]]
    reason: str = ""


def modules() -> list[str]:
    """Return the names of the modules of the installed mlx-lm that define a model."""
    from mlx_lm import models  # slow to import

    (folder,) = map(Path, models.__path__)
    names = [info.name for info in pkgutil.iter_modules([str(folder)])]
    return sorted(name for name in names if re.search(r"^class ModelArgs\b", (folder / f"{name}.py").read_text(), re.MULTILINE))


def tested() -> tuple[str, dict[str, dict[str, str]]]:
    """Return (version of mlx-lm that the tests ran, {label: results})."""
    table = json.loads(TABLE.read_text())
    return table["mlx_lm"], table["models"]


def supported_modules() -> list[Module]:
    """Return every module of the installed mlx-lm with its results, by name."""
    _, results = tested()
    names = modules()
    found = []
    for name in names:
        others = [other for other in names if other.startswith(f"{name}-")]
        variants = {
            label: result
            for label, result in results.items()
            if label == name or (label.startswith(f"{name}-") and not any(label == o or label.startswith(f"{o}-") for o in others))
        }
        refusals = [result["float32"] for result in variants.values() if result["float32"] != RIGHT]
        if name in NOT_RUN:
            found.append(Module(name, "not run", {}, NOT_RUN[name]))
        elif not variants:
            found.append(Module(name, "untested", {}, "newer than the tests"))
        else:
            status = RIGHT if not refusals else "refused" if len(refusals) == len(variants) else "partly"
            found.append(Module(name, status, variants, refusals[0].removeprefix("refused: ") if refusals else ""))
    return found


def installed() -> str:
    """Return the version of the installed mlx-lm."""
    return version("mlx-lm")


def counts(found: list[Module]) -> dict[str, int]:
    """Return {status: number of modules}, without statuses that no module has."""
    return {status: n for status in (RIGHT, "partly", "refused", "not run", "untested") if (n := sum(m.status == status for m in found))}


def remark(module: Module) -> str:
    """Return why a module is refused, and which of its forms mlx-lm itself cannot run; "" if there is nothing to say."""
    parts = [module.reason] if module.reason else []
    for form in ("quantized", "bfloat16"):
        failing = {label: result[form] for label, result in module.variants.items() if result[form] != RIGHT and result["float32"] == RIGHT}
        if failing:
            which = "" if len(failing) == len(module.variants) else f" ({', '.join(failing)})"
            parts.append(f"{form}{which}: {next(iter(failing.values()))}")
    return "; ".join(parts)
