"""The settings of a sweep, as a TOML file holds them: models, recipes, texts, seeds, and what is measured.

Every key is a field of a class here. examples/sweep.toml shows all of them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from metalens.training.settings import is_of_type, require_known, type_in_words
from metalens.training.settle import Wishes
from metalens.utils.errors import InvalidValueError

T = TypeVar("T")

PATTERN = re.compile(r"[*?\[]")  # characters of a name that stands for several folders
HUB = "hf:"


@dataclass(frozen=True)
class SweepModel:
    """A model, or several checkpoints of one.

    Attributes:
        name: name in the report.
        model: folder, GGUF file, hub id or a name that `train` knows. A pattern, as 'run/step-*', stands for every folder that it fits.
    """

    name: str
    model: str


@dataclass(frozen=True)
class SweepText:
    """A text to train on, and one to evaluate on.

    Attributes:
        name: name in the report.
        train: files, folders or hub data sets (hf:...) to train on.
        evaluate: the same to evaluate on. It should have nothing of `train`.
        field: field or column that holds the text.
        train_split, evaluate_split: splits of hub data sets.
    """

    name: str
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    field: str = "text"
    train_split: str = "train"
    evaluate_split: str = "test"


@dataclass(frozen=True)
class SweepRecipe:
    """Settings of a training run, as `train --config` takes them.

    Attributes:
        name: name in the report.
        settings: 'recipe', a budget in tokens, and settings of TrainingConfig.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class SweepEvaluation:
    """What is measured of every lens.

    Attributes:
        max_tokens: tokens to read. None = all.
        max_seq_len: tokens per sequence. None = as `metalens.evaluate`.
        embedding: also measure the embedding's output, through the translator that a lens has for it.
        bias: also measure the bias of every layer.
        layer_transfer: also read every layer with every other layer's translator.
        model_transfer: also read every model with the lenses of the models of equal width and number of layers.
    """

    max_tokens: int | None = None
    max_seq_len: int | None = None
    embedding: bool = False
    bias: bool = True
    layer_transfer: bool = False
    model_transfer: bool = True


@dataclass(frozen=True)
class Sweep:
    """Models x recipes x texts x seeds, and how they are worked through.

    Attributes:
        models, recipes, texts: what is combined.
        evaluation: what is measured.
        seeds: seeds that shuffle the text. They replace the recipe's.
        jobs: processes that work at the same time on this machine.
        checkpoint_every: steps between the checkpoints of a training run.
        out: folder of the results. A file without this key has its own name with -results.
        title: title of the report.
    """

    models: tuple[SweepModel, ...]
    recipes: tuple[SweepRecipe, ...]
    texts: tuple[SweepText, ...]
    evaluation: SweepEvaluation = SweepEvaluation()
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1
    checkpoint_every: int = 50
    out: Path = Path("sweep-results")
    title: str = "Sweep"


TABLES = MappingProxyType({"models": SweepModel, "texts": SweepText})
PLAIN = ("seeds", "jobs", "checkpoint_every", "out", "title")


def read_sweep(file: str | Path) -> Sweep:
    """Read the settings of a sweep. Paths in the file are relative to its folder.

    Args:
        file: a TOML file, as examples/sweep.toml.

    Raises:
        InvalidValueError: if the file is damaged, or has an unknown key or a value of another type or out of range. It names the key.
        OSError: if the file can't be read.
    """
    path = Path(file).expanduser()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{path} can't be read as TOML: {error}.") from error
    _require_keys(found, [*TABLES, "recipes", "evaluation", *PLAIN], ("models", "recipes", "texts"), str(path))
    tables = {name: _tables(found[name], f"{path}: {name}") for name in ("models", "recipes", "texts")}
    models = [_record(SweepModel, table, f"{path}: models[{i}]") for i, table in enumerate(tables["models"])]
    texts = [_record(SweepText, table, f"{path}: texts[{i}]") for i, table in enumerate(tables["texts"])]
    plain = _values({each.name: each for each in fields(Sweep)}, get_type_hints(Sweep), {k: v for k, v in found.items() if k in PLAIN}, str(path))
    evaluation = found.get("evaluation", {})
    if not isinstance(evaluation, dict):
        raise InvalidValueError(f"{path}: evaluation must be a table, [evaluation], got {evaluation!r}.")
    folder = path.parent
    sweep = Sweep(
        models=tuple(each for model in models for each in _expanded(model, folder)),
        recipes=tuple(_recipe(table, f"{path}: recipes[{i}]") for i, table in enumerate(tables["recipes"])),
        texts=tuple(_resolved(text, folder) for text in texts),
        evaluation=_record(SweepEvaluation, evaluation, f"{path}: evaluation"),
        **plain | {"out": folder / plain.get("out", f"{path.stem}-results")},
    )
    _require_sensible(sweep, path)
    return sweep


# ------------------------------------------------------------------ tables and keys


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        name = where.rpartition(" ")[2]
        raise InvalidValueError(f"{where} must be one or more tables [[{name}]], got {value!r}.")
    return value


def _require_keys(found: Mapping[str, Any], known: list[str], required: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(found) - set(known)):
        raise InvalidValueError(f"{where}: unknown key {', '.join(unknown)}. Known keys: {', '.join(known)}.")
    if missing := [name for name in required if name not in found]:
        raise InvalidValueError(f"{where}: {', '.join(missing)} is missing. examples/sweep.toml shows every key.")


def _record(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Return an object of a class of keys, of a table."""
    keys = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    required = tuple(name for name, each in keys.items() if each.default is MISSING)
    _require_keys(table, list(keys), required, where)
    return cls(**_values(keys, get_type_hints(cls), table, where))


def _values(keys: Mapping[str, Field[Any]], kinds: Mapping[str, Any], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a table, each checked against the type of its key."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        kind = kinds[keys[name].name]
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            if not isinstance(value, list) or not value or not all(is_of_type(each, item) for each in value):
                raise InvalidValueError(f"{where}: {name} can't be {value!r}; it takes a list of {'numbers' if item is int else 'texts'}.")
            found[name] = tuple(value)
        elif is_of_type(value, str if kind is Path else kind):
            found[name] = Path(value) if kind is Path else value
        else:
            raise InvalidValueError(f"{where}: {name} can't be {value!r}; it takes {type_in_words(str if kind is Path else kind)}.")
    return found


def _recipe(table: Mapping[str, Any], where: str) -> SweepRecipe:
    settings = dict(table)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise InvalidValueError(f"{where}: name is missing, or is no text. It is the recipe's name in the report.")
    require_known(settings, where)
    if refused := [each for each in ("seed", "minutes") if each in settings]:
        remedy = {"seed": "Name the seeds once for all recipes: seeds = [0, 1].", "minutes": "The result would depend on the machine; give tokens."}
        raise InvalidValueError(f"{where}: a sweep does not take {refused[0]} here. {remedy[refused[0]]}")
    Wishes.of(None, settings, {}, None, None).require_valid()
    return SweepRecipe(name, settings)


# ------------------------------------------------------------------ paths


def _in_folder(name: str, folder: Path) -> str:
    """Return a name of a file or folder, relative to `folder` if it exists there; other names, such as hub ids, are returned as they are."""
    if name.startswith(HUB) or not name:
        return name
    path = folder / Path(name).expanduser()
    return str(path) if path.exists() else name


def _resolved(text: SweepText, folder: Path) -> SweepText:
    for name in (*text.train, *text.evaluate):
        if not name.startswith(HUB) and not (folder / Path(name).expanduser()).exists():
            raise InvalidValueError(f"text {text.name}: there is no file or folder {folder / name}. Paths are relative to the settings file.")
    train, evaluate = (tuple(_in_folder(name, folder) for name in names) for names in (text.train, text.evaluate))
    return replace(text, train=train, evaluate=evaluate)


def _expanded(model: SweepModel, folder: Path) -> list[SweepModel]:
    """Return the models that an entry stands for: itself, or one for each folder of a pattern, in the order of the numbers in their names."""
    if not PATTERN.search(model.model):
        return [SweepModel(model.name, _in_folder(model.model, folder))]
    pattern = Path(model.model).expanduser()
    root = Path(pattern.anchor) if pattern.is_absolute() else folder
    found = [path for path in root.glob(str(pattern.relative_to(pattern.anchor))) if (path / "config.json").is_file()]
    if not found:
        raise InvalidValueError(f"model {model.name}: no folder with a config.json fits {model.model}. Paths are relative to the settings file.")
    return [SweepModel(f"{model.name} {path.name}", str(path)) for path in sorted(found, key=lambda path: _natural(str(path)))]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts step-9 before step-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------ ranges


def _require_sensible(sweep: Sweep, file: Path) -> None:
    for kind, items in (("models", sweep.models), ("recipes", sweep.recipes), ("texts", sweep.texts)):
        names = [item.name for item in items]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidValueError(f"{file}: {kind} have the name {', '.join(twice)} more than once. Names tell them apart in the report.")
        if "" in names:
            raise InvalidValueError(f"{file}: {kind} have an empty name. Give each a name for the report.")
    for name, least in (("jobs", 1), ("checkpoint_every", 1)):
        if getattr(sweep, name) < least:
            raise InvalidValueError(f"{file}: {name} must be at least {least}, got {getattr(sweep, name)}.")
    if min(sweep.seeds) < 0 or len(set(sweep.seeds)) < len(sweep.seeds):
        raise InvalidValueError(f"{file}: seeds must be different whole numbers of at least 0, got {list(sweep.seeds)}.")
    for name in ("max_tokens", "max_seq_len"):
        value = getattr(sweep.evaluation, name)
        if value is not None and value < 2:
            raise InvalidValueError(f"{file}: evaluation: {name} must be at least 2, got {value}: a prediction needs a next token.")
