"""Settings of a run from several places: a recipe, changed by a file of settings, changed by the caller."""

from __future__ import annotations

import json
import math
import sys
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from metalens.models.language_model import DEFAULT_SEQUENCE
from metalens.training.budget import divided
from metalens.training.config import TrainingConfig, in_words, natural_shift, setting_types
from metalens.training.recipes import RECIPES, settings_of
from metalens.utils.errors import InvalidValueError

DEFAULT_RECIPE = "fast"

# Recipes leave these open. A run never repeats its text unless the caller asks for it.
DEFAULTS = {"repeat": False, "seed": 0}

BUDGETS = {"tokens": int, "minutes": float}  # settings of the caller that settle others

MAX_SEQ_LEN_DEFAULT = f"{DEFAULT_SEQUENCE}, or the model's context if that is shorter"


def resolve(
    recipe: str | None,
    config: TrainingConfig | Mapping[str, Any] | str | Path | None,
    settings: Mapping[str, Any],
    context: int | None = None,
    hidden_size: int | None = None,
    *,
    from_lens: bool = False,
) -> tuple[str | None, TrainingConfig]:
    """Return the name of the recipe and the configuration of a run.

    `settings` replace those of `config`, which replace those of the recipe. Two defaults follow from others: sequences are as long as the model's
    context and the step allow, up to 512 tokens; and translators of low rank or of biases alone begin without the warm start, which gives full
    matrices. So does a run that starts from a lens.

    Args:
        recipe: name of a recipe. None = the one that `config` names with 'recipe', else 'fast'.
        config: more settings: a JSON or TOML file, a dict, or a complete TrainingConfig, which needs no recipe.
        settings: settings by name. 'tokens' is a budget instead of a setting: see `metalens.training.budget`.
        context: longest sequence of the model, in tokens, if it is known.
        hidden_size: dimension of the model's hidden states, if it is known.
        from_lens: whether the run starts from a lens.

    Raises:
        InvalidValueError: for unknown settings, for values out of range, and for settings that exclude each other.
        OSError: if the file can't be read.
    """
    if recipe == "":
        raise InvalidValueError(f"The name of the recipe is empty. Known recipes: {', '.join(RECIPES)}.")
    if isinstance(config, TrainingConfig):
        given = config.to_dict()
        name = recipe
    else:
        given = read_settings(config) if isinstance(config, (str, Path)) else dict(config or {})
        name = recipe or given.pop("recipe", None) or DEFAULT_RECIPE
    given = {key: value for key, value in given.items() if key != "recipe"} | dict(settings)
    tokens = given.pop("tokens", None)
    merged = ({} if name is None else DEFAULTS | settings_of(name)) | given
    if (merged.get("rank") or merged.get("bias_only")) and "warm_start_tokens" not in given and merged.get("num_steps") != 0:
        merged["warm_start_tokens"] = 0
    shift, natural = merged.get("token_shift"), natural_shift(merged.get("loss", "kl"))
    if shift not in (None, natural) and "warm_start_tokens" not in given:
        merged["warm_start_tokens"] = 0
    if (natural if shift is None else shift) and "shuffle_tokens" not in given:
        merged["shuffle_tokens"] = 0
    if from_lens:
        _require_steps_alone(merged, given)
        merged["warm_start_tokens"] = 0
    longest = min(limit or sys.maxsize for limit in (merged.get("max_seq_len", DEFAULT_SEQUENCE), context))
    chosen: Mapping[str, Any] = given
    if tokens is not None:
        chosen = settings if isinstance(config, TrainingConfig) else given  # a budget divides a complete configuration anew
        found = divided(require_tokens(tokens), merged, chosen, longest, hidden_size)
        longest = found.get("max_seq_len", longest)
        merged |= found
    if "max_seq_len" not in chosen:
        merged["max_seq_len"] = min(longest, merged.get("tokens_per_step") or sys.maxsize)
    return name, TrainingConfig.from_dict(merged)


def _require_steps_alone(merged: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check the settings of a run that starts from a lens (InvalidValueError): it has steps, and no closed form, which would replace the lens."""
    if given.get("warm_start_tokens"):
        raise InvalidValueError("A run that starts from a lens has no warm start, which would replace the lens: set warm_start_tokens to 0.")
    if merged.get("num_steps") == 0:
        raise InvalidValueError("A run that starts from a lens needs steps, and these settings have none: give num_steps, or a recipe with steps.")


def budget_in_minutes(
    config: TrainingConfig | Mapping[str, Any] | str | Path | None, tokens: int | None, minutes: float | None
) -> tuple[TrainingConfig | Mapping[str, Any] | str | Path | None, float | None]:
    """Return a configuration without a budget in minutes, and this budget, None if there is none.

    Args:
        config: the configuration. Its budget, in tokens or minutes, is replaced by that of the caller.
        tokens, minutes: budgets of the caller, or None.

    Raises:
        InvalidValueError: if there are budgets of both kinds in one place, for minutes that are none, and as for `resolve`.
        OSError: if a file can't be read.
    """
    given: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    if isinstance(config, (str, Path)):
        given = read_settings(config)
    if minutes is not None:
        require_minutes(minutes, tokens)
    elif given.get("minutes") is not None:
        require_minutes(given["minutes"], given.get("tokens"))
        minutes = given["minutes"] if tokens is None else None
    if (minutes is None and "minutes" not in given) or isinstance(config, TrainingConfig) or config is None:
        return config, minutes
    return {key: value for key, value in given.items() if key not in BUDGETS}, minutes


def require_minutes(minutes: Any, tokens: int | None) -> None:
    """Check a budget in minutes (InvalidValueError)."""
    if isinstance(minutes, bool) or not (isinstance(minutes, (int, float)) and 0 < minutes < math.inf):
        raise InvalidValueError(f"minutes must be a number above 0, got {minutes!r}.")
    if tokens is not None:
        raise InvalidValueError("A budget is in tokens or in minutes: give one of them.")


def require_tokens(tokens: Any) -> int:
    """Check a budget of tokens (InvalidValueError)."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidValueError(f"tokens must be a whole number of at least 1, got {tokens!r}.")
    return tokens


def read_settings(file: str | Path) -> dict[str, Any]:
    """Read a file of settings: TOML if its name ends in .toml, else JSON. 'recipe' and a budget, 'tokens' or 'minutes', may be among them.

    Raises:
        InvalidValueError: if the name is empty or the file damaged, or if it has an unknown setting or one of another type. It names both.
        OSError: if it can't be read.
    """
    if not str(file):
        raise InvalidValueError("The name of the file of settings is empty. Name a file, or give None.")
    file = Path(file)
    is_toml = file.suffix.lower() == ".toml"
    try:
        text = file.read_text(encoding="utf-8")
        found: Any = tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{file} can't be read as {'TOML' if is_toml else 'JSON'}: {error}.") from error
    if not isinstance(found, dict):
        raise InvalidValueError(f'{file} must hold one object with settings, like {{"recipe": "paper", "num_steps": 100}}.')
    require_known(found, str(file))
    return found


def require_known(found: Mapping[str, Any], where: str) -> None:
    """Check that settings, 'recipe' and a budget have known names and values of their types (InvalidValueError).

    Args:
        found: the settings by name, as JSON or TOML holds them.
        where: where they stand, for the error.
    """
    kinds = setting_types() | {"recipe": str} | BUDGETS
    if unknown := sorted(set(found) - set(kinds)):
        raise InvalidValueError(
            f"{where}: unknown setting {', '.join(unknown)}. Known settings: recipe, {', '.join(BUDGETS)}, {', '.join(sorted(setting_types()))}."
        )
    for name, value in found.items():
        if not is_of_type(value, kinds[name]):
            raise InvalidValueError(f"{where}: {name} can't be {value!r}; it takes {type_in_words(kinds[name])}.")


def is_of_type(value: Any, kind: Any) -> bool:
    """Tell whether a JSON value is of the type of a setting."""
    if get_origin(kind) in (Union, UnionType):
        return any(is_of_type(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(type(each) is int for each in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def type_in_words(kind: Any) -> str:
    """Return the type of a setting in the words of JSON and TOML."""
    return in_words(kind).replace("True or False", "true or false").replace("None", "null")


def example_file() -> str:
    """Return examples/train.toml: every setting with its help and the value that `train` gives it with the default recipe.

    TOML has no null: a setting without a value, or with one that depends on the model, stands behind a '#' with an example.
    """
    _, config = resolve(None, None, {})
    lines = [
        "# The settings of `metalens train --config train.toml` and of `metalens.train(..., config='train.toml')`.",
        "# Every value here is the default. Options of the command and arguments of the function override the file.",
        "",
        f"# Named settings to start from: {', '.join(RECIPES)}. The settings below replace the recipe's.",
        f"recipe = {json.dumps(DEFAULT_RECIPE)}",
        "",
        "# A budget, which the recipe divides: tokens of the text in all, or minutes on this machine. Without these lines: the recipe's own numbers.",
        "# tokens = 9000",
        "# minutes = 10",
    ]
    for each in fields(TrainingConfig):
        value, unset = getattr(config, each.name), each.metadata["unset"]
        if each.name == "max_seq_len":
            comment, line = f"{each.metadata['help']} Without this line: {MAX_SEQ_LEN_DEFAULT}.", f"# max_seq_len = {DEFAULT_SEQUENCE}"
        elif value is None:
            comment, line = f"{each.metadata['help']} Without this line: {unset}.", f"# {each.name} = {json.dumps(each.metadata['example'])}"
        else:
            comment, line = each.metadata["help"], f"{each.name} = {json.dumps(value)}"
        lines += ["", *textwrap.wrap(comment, 118, initial_indent="# ", subsequent_indent="# "), line]
    return "\n".join(lines) + "\n"
