"""The cells of a sweep: one lens, or one evaluation of a lens, each with a result in a file of its own.

A cell is named by what its result follows from: the hashes of the model's files and of the texts, and the settings. A finished cell is never run
again. With other settings it is another cell, with another folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from metalens.models.registry import path_of
from metalens.sweep.settings import Sweep, SweepEvaluation, SweepModel, SweepRecipe, SweepText
from metalens.training.data import find_sources
from metalens.training.data.readers import FileSource, Identity
from metalens.utils.files import atomic_write, sha256_of, sha256_of_values

FORMAT = 1
RESULT = "result.json"
CHECKSUM = "checksum"  # key of a result: the SHA-256 of the others
FOLDERS = {"lens": "lenses", "evaluation": "evaluations"}
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Cell:
    """One piece of work of a sweep. All fields are JSON values, so that another process can run it.

    Attributes:
        kind: 'lens' = train a lens; 'evaluation' = measure one on a model.
        names: names for the report: model, text, recipe and seed; of an evaluation also lens_model, the model that the lens was trained for.
        settings: everything that the result follows from.
        inputs: where the cell finds its inputs on this machine.
    """

    kind: Literal["lens", "evaluation"]
    names: dict[str, Any]
    settings: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Return a hash of what the result follows from."""
        return hashlib.sha256(json.dumps([FORMAT, self.kind, self.names, self.settings], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Return the cell in words: 'lens demo / fast / help / seed 0'."""
        lens = self.names.get("lens_model")
        model = self.names["model"] if lens in (None, self.names["model"]) else f"{lens} on {self.names['model']}"
        return f"{self.kind} {model} / {self.names['recipe']} / {self.names['text']} / seed {self.names['seed']}"

    @property
    def folder(self) -> Path:
        """Return the folder of the cell, relative to that of the sweep."""
        words = [self.names.get("lens_model", ""), self.names["model"], self.names["recipe"], self.names["text"], f"seed{self.names['seed']}"]
        readable = "--".join(re.sub(r"[^A-Za-z0-9_.-]+", "-", str(word))[:40] for word in words if word)
        return Path(FOLDERS[self.kind]) / f"{readable}--{self.fingerprint}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """Return the cell's result, or None if it is not finished. A damaged file is as good as none.

        Args:
            out: folder of the sweep.
        """
        try:
            found: Any = json.loads((out / self.folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.pop(CHECKSUM, None) != sha256_of_values(found):
            return None
        return found if found.get("format") == FORMAT and found.get("settings") == self.settings else None

    def write(self, out: Path, result: Mapping[str, Any]) -> None:
        """Write the cell's result. It is there whole, or not at all (OSError)."""
        folder = out / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "kind": self.kind, "names": self.names, "settings": self.settings, "inputs": self.inputs}
        written = json.loads(json.dumps({**about, **result}, allow_nan=False))  # as it will be read: with lists for tuples
        with atomic_write(folder / RESULT) as temporary:
            temporary.write_text(json.dumps({**written, CHECKSUM: sha256_of_values(written)}, indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as JSON holds it."""
        return asdict(self)


# ------------------------------------------------------------------ which cells there are


def lens_cells(sweep: Sweep) -> list[Cell]:
    """Return the lenses to train, those of one model together.

    Raises:
        OSError, InvalidValueError: if a model or a text is not there.
    """
    texts = [(text, text_identity(text.train, text.field, text.train_split)) for text in sweep.texts]
    return [
        _lens_cell(model, identity, recipe, text, files, seed)
        for model in sweep.models
        for identity in [model_identity(model.model)]
        for text, files in texts
        for recipe in sweep.recipes
        for seed in sweep.seeds
    ]


def _lens_cell(model: SweepModel, identity: Identity, recipe: SweepRecipe, text: SweepText, files: list[Identity], seed: int) -> Cell:
    names = {"model": model.name, "recipe": recipe.name, "text": text.name, "seed": seed}
    settings = {"model": identity, "text": files, "training": {**recipe.settings, "seed": seed}}
    inputs = {"model": model.model, "text": list(text.train), "field": text.field, "split": text.train_split}
    return Cell("lens", names, settings, inputs)


def evaluation_cells(sweep: Sweep, lenses: list[Cell], out: Path) -> list[Cell]:
    """Return the evaluations of the lenses that have been trained, those of one model together.

    Each lens is measured on its own model, and with `model_transfer` on every other model of the same width and number of layers.

    Args:
        sweep: the settings.
        lenses: the lenses of the sweep.
        out: folder of the sweep.
    """
    trained = [(cell, result) for cell in lenses if (result := cell.result(out)) is not None]
    shapes = {cell.names["model"]: _shape(result) for cell, result in trained}
    texts = {text.name: (text, text_identity(text.evaluate, text.field, text.evaluate_split)) for text in sweep.texts}
    found = []
    for model in sweep.models:
        identity = model_identity(model.model)
        for cell, result in trained:
            own = cell.names["model"] == model.name
            fits = sweep.evaluation.model_transfer and shapes.get(model.name) == _shape(result)
            if own or fits:
                found.append(_evaluation_cell(sweep.evaluation, model, identity, cell, *texts[cell.names["text"]]))
    return found


def _shape(result: Mapping[str, Any]) -> tuple[int, int]:
    return result["model"]["num_layers"], result["model"]["hidden_size"]


def _evaluation_cell(evaluation: SweepEvaluation, model: SweepModel, identity: Identity, lens: Cell, text: SweepText, files: list[Identity]) -> Cell:
    names = {**lens.names, "lens_model": lens.names["model"], "model": model.name}
    measured = {name: value for name, value in asdict(evaluation).items() if name != "model_transfer"}
    settings = {"model": identity, "lens": lens.fingerprint, "text": files, "evaluation": measured}
    inputs = {"model": model.model, "lens": (lens.folder / "lens").as_posix(), "text": list(text.evaluate)}
    return Cell("evaluation", names, settings, inputs | {"field": text.field, "split": text.evaluate_split})


# ------------------------------------------------------------------ what the inputs are


def model_identity(name: str) -> Identity:
    """Return what tells a model from others: the SHA-256 of its files, or the name of a model that is on the hub.

    Raises:
        OSError: if a file can't be read.
        InvalidValueError, UnavailableError: if a model that is made from a package or a GGUF file can't be made.
    """
    folder = Path(path_of(name, make=True)).expanduser()
    if not folder.is_dir():
        return {"name": name}
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    return {"files": {path.name: sha256_of(path) for path in files}}


def text_identity(names: tuple[str, ...], field: str, split: str) -> list[Identity]:
    """Return what tells a text from others: the hashes of its files, or the names of data sets with their revision."""
    sources = find_sources(list(names), field=field, split=split)
    return [source.identity() if isinstance(source, FileSource) else {"name": source.name, "field": field} for source in sources]
