"""Which models of mlx-lm a lens can read: the table that the tests' zoo of tiny models left behind, and what an installed mlx-lm has beyond it."""

from __future__ import annotations

import json
import pkgutil
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).parents[1] / "assets" / "models.json"

RIGHT = "right"

# Modules that the tests' machine (Linux, CPU) can't run, and why.
NOT_RUN = {
    "bitnet": "its linear layers are Metal kernels without a CPU version",
    "muse_spark": "its attention, norms and experts are Metal kernels without a CPU version",
    "olmo": "it needs the package hf_olmo, and its mask fails for more than one token",
}

# Of 97 modules of an earlier mlx-lm, read with mlxterp 0.1 by the same standard: last layer's logits, a lens, a training step.
MLXTERP = {"right": 64, "refused": 21, "wrong, with a warning": 8, "wrong, without": 6}


@dataclass(frozen=True)
class Module:
    """What the tests found for one module of mlx-lm.

    Attributes:
        name: in mlx_lm.models, which is mostly the model_type of a config.json.
        status: "right", "refused", "not run", "untested"; "partly" where some variants are refused.
        variants: {label: {"float32", "quantized", "bfloat16": "right" or why not}}.
        reason: why not, in words; "" for right.
    """

    name: str
    status: str
    variants: dict[str, dict[str, str]]
    reason: str = ""


def modules() -> list[str]:
    """The installed mlx-lm's modules that are models."""
    from mlx_lm import models  # slow to import

    (folder,) = map(Path, models.__path__)
    names = [info.name for info in pkgutil.iter_modules([str(folder)])]
    return sorted(name for name in names if re.search(r"^class ModelArgs\b", (folder / f"{name}.py").read_text(), re.MULTILINE))


def tested() -> tuple[str, dict[str, dict[str, str]]]:
    """(version of mlx-lm that the tests ran, {label: results})."""
    table = json.loads(TABLE.read_text())
    return table["mlx_lm"], table["models"]


def support() -> list[Module]:
    """Every module of the installed mlx-lm, by name."""
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
    """The installed mlx-lm's version."""
    return version("mlx-lm")


def counts(found: list[Module]) -> dict[str, int]:
    """How many modules have which status."""
    return {status: n for status in (RIGHT, "partly", "refused", "not run", "untested") if (n := sum(m.status == status for m in found))}


def remark(module: Module) -> str:
    """What is to be said of a module beside its status: why it is refused, and which forms mlx-lm itself can't run."""
    parts = [module.reason] if module.reason else []
    for form in ("quantized", "bfloat16"):
        failing = {label: result[form] for label, result in module.variants.items() if result[form] != RIGHT and result["float32"] == RIGHT}
        if failing:
            which = "" if len(failing) == len(module.variants) else f" ({', '.join(failing)})"
            parts.append(f"{form}{which}: {next(iter(failing.values()))}")
    return "; ".join(parts)
