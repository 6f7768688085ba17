"""The options that make a TrainingConfig: a recipe, changed by a file of settings, changed by options."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from metalens.cli.common import DEFAULT_LENGTH, parse_layers
from metalens.training import RECIPES, TrainingConfig, recipe
from metalens.training.config import MIN_SEQUENCE
from metalens.utils.errors import InvalidValueError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_RECIPE = "fast"

SEQUENCE = 512  # tokens, where neither recipe nor model says less


def parse_seed(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    """A number, or 'none'."""
    if value is None or value == "none":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'none'.") from None


POSITIVE, COUNT = click.IntRange(min=1), click.IntRange(min=0)

# Parameters have the names of TrainingConfig's fields.
OPTIONS = (
    click.option("--recipe", help=f"Named settings: {', '.join(RECIPES)}.  [default: {DEFAULT_RECIPE}]"),
    click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="JSON or TOML with settings of TrainingConfig, and 'recipe'; they change the recipe, and options change them.",
    ),
    click.option("--steps", "num_steps", type=COUNT, help="Optimizer steps."),
    click.option("--tokens-per-step", type=POSITIVE, help="Rounded down to whole sequences; in the paper 262144."),
    click.option("--max-seq-len", type=click.IntRange(min=MIN_SEQUENCE), help=f"Tokens per sequence.  {DEFAULT_LENGTH}"),
    click.option("--lr", "learning_rate", type=float, help="Learning rate after the warm-up."),
    click.option("--momentum", type=float, help="Of SGD and Muon; beta_1 of Adam."),
    click.option("--gradient-clip", type=float, help="Largest gradient norm over all layers; SGD and Adam."),
    click.option("--weight-decay", type=float, help="Of W - I and b."),
    click.option("--optimizer", type=click.Choice(["sgd", "adam", "muon"])),
    click.option("--reduction", type=click.Choice(["mean", "sum"]), help="Of the loss over layers."),
    click.option("--schedule", type=click.Choice(["linear", "constant"]), help="Of the learning rate."),
    click.option("--layer-rates", type=click.Choice(["equal", "distance"]), help="Of the learning rate: by how far the warm start moved each layer."),
    click.option("--warmup-steps", type=COUNT, help="The learning rate rises over so many steps."),
    click.option("--warm-start-tokens", type=COUNT, help="Begin with the closed-form solution on so many tokens; 0 = with the identity."),
    click.option("--ridge", type=float, help="Of the closed form."),
    click.option("--repeat/--no-repeat", default=None, help="Go over the text again when it is used up.  [default: an error says what is missing]"),
    click.option("--seed", callback=parse_seed, metavar="N|none", help="Of the order of the sequences; none = as they come.  [default: 0]"),
    click.option("--layers", callback=parse_layers, metavar="0,4-7,...", help="Train these blocks only.  [default: all]"),
    click.option("--layers-at-once", type=POSITIVE, help="So many layers per pass over the data, to save memory.  [default: all]"),
    click.option("--rank", type=POSITIVE, help="Translators h + B A h + b of this rank.  [default: full matrices]"),
    click.option("--bias-only", is_flag=True, default=None, help="Translators h + b."),
    click.option("--ns-steps", type=POSITIVE, help="Muon's iterations.  [default: by the size of the matrix]"),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of parameters and optimizer state."),
)


def training_options(command: F) -> F:
    """All of them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def data_options(required: bool) -> Callable[[Any], Any]:
    """--data and how it is read."""

    def options(command: Any) -> Any:
        for option in (
            click.option("--split", default="train", show_default=True, help="Of hub data sets."),
            click.option("--field", default="text", show_default=True, help="Field or column with the text."),
            click.option(
                "--data",
                required=required,
                multiple=True,
                metavar="FILE...",
                help="UTF-8 text, JSON Lines or Parquet; folders of these; hf:DATASET[:CONFIGURATION][@REVISION].",
            ),
        ):
            command = option(command)
        return command

    return options


SHARE = click.option(
    "--share",
    type=click.Choice(["data", "layers"]),
    default="data",
    show_default=True,
    help="What the processes that mlx.launch starts divide among them.",
)


def config_of(recipe_name: str | None, config_file: Path | None, options: dict[str, Any], context: int | None = None) -> tuple[str, TrainingConfig]:
    """(name of the recipe, settings).

    Args:
        recipe_name: None = the file's, or the default.
        config_file: settings.
        options: by field; None where the user said nothing.
        context: tokens that the model was made for, if known.

    Raises:
        ValueError: for settings that do not exist, or do not go together.
    """
    chosen = {} if config_file is None else read_settings(config_file)
    name = recipe_name or chosen.get("recipe") or DEFAULT_RECIPE
    chosen = {key: value for key, value in chosen.items() if key != "recipe"} | {key: value for key, value in options.items() if value is not None}
    if chosen.get("seed") == "none":
        chosen["seed"] = None
    recipe(name)  # an error for a name that is none
    # mlxterp takes the text as it comes. Text is never repeated unless somebody says so.
    settings = {"repeat": False, "seed": None if name == "mlxterp" else 0} | RECIPES[name] | chosen
    if "max_seq_len" not in chosen:
        settings["max_seq_len"] = min(settings.get("max_seq_len", SEQUENCE), context or sys.maxsize, settings.get("tokens_per_step") or sys.maxsize)
    if (settings.get("rank") or settings.get("bias_only")) and "warm_start_tokens" not in chosen:
        settings["warm_start_tokens"] = 0  # it gives full matrices
    return name, TrainingConfig.from_dict(settings)


def read_settings(file: Path) -> dict[str, Any]:
    """A file of settings, JSON unless its name ends in .toml.

    Raises:
        ValueError: if it can't be read, or has a setting that does not exist or is of another type; names it and the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
        found: Any = tomllib.loads(text) if file.suffix.lower() == ".toml" else json.loads(text)
    except ValueError as error:
        raise InvalidValueError(f"{file} can't be read as {'TOML' if file.suffix.lower() == '.toml' else 'JSON'}: {error}.") from error
    if not isinstance(found, dict):
        raise InvalidValueError(f'{file} must hold one object with settings, like {{"recipe": "paper", "num_steps": 100}}.')
    kinds = get_type_hints(TrainingConfig) | {"recipe": str}
    if unknown := sorted(set(found) - set(kinds)):
        raise InvalidValueError(
            f"{file}: there is no setting {', '.join(unknown)}. Settings are: recipe, {', '.join(sorted(set(kinds) - {'recipe'}))}."
        )
    for name, value in found.items():
        if not fits(value, kinds[name]):
            raise InvalidValueError(f"{file}: {name} can't be {value!r}; it takes {described(kinds[name])}.")
    return found


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(type(each) is int for each in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def described(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(described(each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}[kind]
