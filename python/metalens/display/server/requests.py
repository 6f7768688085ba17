"""What browsers may ask for, checked before a model sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metalens.utils.errors import InvalidValueError
from metalens.viewer.page import TextAndLens

MOST_TEXTS = 2
MOST_TOKENS = 6  # followed at once
MOST_TRAJECTORIES = 4
LARGEST_BODY = 2**20  # bytes


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_tokens: tokens of a text.
        max_new_tokens: tokens to generate.
        top_k: most likely tokens of each cell.
    """

    max_tokens: int = 2048
    max_new_tokens: int = 256
    top_k: int = 8


@dataclass(frozen=True)
class ReadRequest:
    """Read texts, and go on from the first one if there are new tokens.

    Attributes:
        texts: one or two texts.
        tokens: texts or ids of tokens to follow.
        new_tokens: number of tokens to generate; 0 = only read.
    """

    texts: list[str]
    tokens: list[str | int]
    new_tokens: int = 0


@dataclass(frozen=True)
class FollowRequest:
    """Follow tokens in texts that were read before.

    Attributes:
        tokens: texts or ids of the tokens.
        reading: name of the job that read the texts, as its parts have it.
        shown: what the page shows.
    """

    tokens: list[str | int]
    reading: str
    shown: list[TextAndLens]


@dataclass(frozen=True)
class CompareRequest:
    """Compare two trajectories of texts that were read before; each layer with the next one, if both are the same.

    Attributes:
        reading: as in `FollowRequest`.
        a, b: the trajectories.
    """

    reading: str
    a: TextAndLens
    b: TextAndLens


def parsed(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a request (InvalidValueError if it is none)."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"The request is no JSON: {error!s:.100}.") from None
    if not isinstance(found, dict):
        raise InvalidValueError("The request must be a JSON object.")
    return found


def read_request(body: bytes, limits: Limits, *, generates: bool) -> ReadRequest:
    """Return a request to read texts or to generate.

    Raises:
        InvalidValueError: if it asks for something else, or for too much.
    """
    asked = parsed(body)
    _only(asked, {"texts", "tokens", "new_tokens"} if generates else {"texts", "tokens"})
    texts = asked.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts) or not 1 <= len(texts) <= MOST_TEXTS:
        raise InvalidValueError(f"'texts' must be a list of one or {MOST_TEXTS} texts, none of them empty.")
    if generates and len(texts) != 1:
        raise InvalidValueError("Only one text at a time can be continued.")
    new_tokens = asked.get("new_tokens", 0)
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or not (1 if generates else 0) <= new_tokens <= limits.max_new_tokens:
        raise InvalidValueError(f"'new_tokens' must be a whole number from 1 to {limits.max_new_tokens}, got {new_tokens!r:.40}.")
    return ReadRequest(texts, followed(asked), new_tokens)


def followed(asked: Mapping[str, Any]) -> list[str | int]:
    """Return the tokens that a request follows (InvalidValueError if they are none, or too many)."""
    tokens = asked.get("tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(t, (str, int)) and not isinstance(t, bool) for t in tokens) or len(tokens) > MOST_TOKENS:
        raise InvalidValueError(f"'tokens' must be a list of at most {MOST_TOKENS} tokens, as texts or ids.")
    return tokens


def follow_request(body: bytes) -> FollowRequest:
    """Return a request to follow tokens (InvalidValueError if it is none)."""
    asked = parsed(body)
    _only(asked, {"reading", "shown", "tokens"})
    tokens = followed(asked)
    if not tokens:
        raise InvalidValueError("'tokens' is empty: name a token to follow.")
    return FollowRequest(tokens, _reading(asked), _trajectories(asked, "shown"))


def compare_request(body: bytes) -> CompareRequest:
    """Return a request to compare (InvalidValueError if it is none)."""
    asked = parsed(body)
    _only(asked, {"reading", "of"})
    found = _trajectories(asked, "of")
    if len(found) != 2:
        raise InvalidValueError(f"'of' must name two trajectories, got {len(found)}.")
    return CompareRequest(_reading(asked), found[0], found[1])


def _reading(asked: Mapping[str, Any]) -> str:
    reading = asked.get("reading")
    if not isinstance(reading, str):
        raise InvalidValueError("'reading' must be the name that the parts of the text came with.")
    return reading


def _trajectories(asked: Mapping[str, Any], name: str) -> list[TextAndLens]:
    """Return the trajectories that a request names (InvalidValueError if they are none, or too many)."""

    def is_index(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    given = asked.get(name)
    pairs = given if isinstance(given, list) else []
    if not 1 <= len(pairs) <= MOST_TRAJECTORIES or not all(isinstance(pair, list) and len(pair) == 2 and all(map(is_index, pair)) for pair in pairs):
        raise InvalidValueError(f"'{name}' must be a list of 1 to {MOST_TRAJECTORIES} pairs [text, lens], counted from 0.")
    return [(text, lens) for text, lens in pairs]


def _only(asked: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(asked) - known)
    if unknown:
        raise InvalidValueError(
            f"The request has {', '.join(map(repr, unknown))!s:.100}, which this server does not know. It knows {', '.join(sorted(known))}."
        )
