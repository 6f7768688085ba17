"""Options for the settings of a run. They follow from the fields of TrainingConfig."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from types import NoneType
from typing import Any, TypeVar, get_args

import click

from metalens.cli.common import FilePath, parse_layers
from metalens.training.config import TrainingConfig, choices_of, setting_types
from metalens.training.recipes import RECIPES
from metalens.training.settings import DEFAULT_RECIPE, MAX_SEQ_LEN_DEFAULT

F = TypeVar("F", bound=Callable[..., Any])


def parse_seed(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    """Return a number, or 'none'."""
    if value is None or value == "none":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'none'.") from None


def parse_vocabulary(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    """Return a number, or 'full' or 'sampled'. TrainingConfig checks the range."""
    if value is None or value in choices_of(setting_types()["vocabulary"]):
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'full' or 'sampled'.") from None


# {setting: option}, where the option has another name than the setting.
SPELLINGS = {"num_steps": "--steps", "learning_rate": "--lr"}

# {setting: arguments of click.option}, where they do not follow from the type of the setting.
SPECIAL: dict[str, dict[str, Any]] = {
    "seed": {"type": str, "callback": parse_seed, "metavar": "N|none"},
    "vocabulary": {"type": str, "callback": parse_vocabulary, "metavar": "full|sampled|N"},
    "layers": {"type": str, "callback": parse_layers, "metavar": "0,4-7,..."},
}

# {setting: its default}, of settings that recipes leave open and whose None is not the default.
SHOWN_DEFAULTS = {
    "max_seq_len": MAX_SEQ_LEN_DEFAULT,
    "seed": "0; none = the order of the text, as with the recipe mlxterp",
    "repeat": "--no-repeat",
}


def spelling_of(setting: str) -> str:
    """Return the option of a setting."""
    return SPELLINGS.get(setting, "--" + setting.replace("_", "-"))


def setting_option(field: Field[Any]) -> Callable[[F], F]:
    """Return the option of a setting: its type, range, choices and help follow from its field of TrainingConfig."""
    kind, option, smallest = _without_none(setting_types()[field.name]), spelling_of(field.name), field.metadata["at_least"]
    in_recipes = any(field.name in settings for settings in RECIPES.values())
    on_in_recipes = any(settings.get(field.name) is True for settings in RECIPES.values())
    shown = SHOWN_DEFAULTS.get(field.name, None if in_recipes else field.metadata["unset"])
    about: dict[str, Any] = {"help": field.metadata["help"] + (f"  [default: {shown}]" if shown else ""), "default": None}
    if field.name in SPECIAL:
        about |= SPECIAL[field.name]
    elif kind is bool:
        if field.default or on_in_recipes:
            option += f"/--no-{option.removeprefix('--')}"
        else:
            about["is_flag"] = True
    elif choices_of(kind):
        about["type"] = click.Choice(choices_of(kind))
    elif kind is int and smallest is not None:
        about["type"] = click.IntRange(min=smallest)
    else:
        about["type"] = kind
    return click.option(option, field.name, **about)


def _without_none(kind: Any) -> Any:
    """Return T for a type `T | None`."""
    rest = [each for each in get_args(kind) if each is not NoneType]
    return rest[0] if NoneType in get_args(kind) else kind


def training_options(command: F) -> F:
    """Add the options that make a TrainingConfig."""
    options = [
        click.option("--recipe", help=f"Named settings to start from: {', '.join(RECIPES)}.  [default: {DEFAULT_RECIPE}]"),
        click.option(
            "--config",
            "config_file",
            type=FilePath(exists=True, dir_okay=False),
            help="JSON or TOML file of settings, 'recipe' and a budget, as in examples/train.toml. They override the recipe; options override them.",
        ),
        click.option(
            "--tokens",
            type=click.IntRange(min=1),
            help="Budget: tokens of the text in all, which the recipe divides between guard, warm start, steps and tokens per step.",
        ),
        click.option(
            "--minutes", type=click.FloatRange(min=0, min_open=True), help="Budget in minutes on this machine, by a probe of about a second."
        ),
        *map(setting_option, fields(TrainingConfig)),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as options."""
    return {name: None if value == "none" else value for name, value in options.items() if value is not None}


def in_options(changes: Mapping[str, Any]) -> str:
    """Return changes of settings in the words of the command line: '--steps 12', '--repeat'."""
    return " ".join(spelling_of(name) if value is True else f"{spelling_of(name)} {value}" for name, value in changes.items())
