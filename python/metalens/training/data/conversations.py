"""Conversations: messages, or a prompt and its completion, as records of chat data have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metalens.utils.errors import InvalidValueError

# Fields that may hold conversations. The fingerprint of their text includes the chat template.
CHAT_FIELDS = ("messages", "conversation")
PAIR = ("prompt", "completion")  # fields of a record that has a conversation in their place

ANSWERER = "assistant"  # role of the model


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation.

    Attributes:
        messages: messages like {"role": "user", "content": "..."}.
        answers: numbers of the messages that are the model's answers, ascending. Of a prompt and a completion these are the completion's alone.
    """

    messages: list[dict[str, str]]
    answers: tuple[int, ...]


def conversation_of(record: Any, field: str, where: str) -> Conversation | None:
    """Return the conversation in a record, None if it has none.

    Args:
        record: what a line, a row or a list has: an object with messages in `field`, or with "prompt" and "completion", each a text or messages.
        field: name of the field, one of CHAT_FIELDS.
        where: place of the record, for errors.

    Raises:
        InvalidValueError: if a message is none.
    """
    if field not in CHAT_FIELDS or not isinstance(record, Mapping):
        return None
    if isinstance(record.get(field), Sequence) and not isinstance(record[field], str):
        messages = _messages(record[field], where)
        return Conversation(messages, tuple(i for i, message in enumerate(messages) if message["role"] == ANSWERER))
    if record.get(field) is None and set(PAIR) <= set(record):
        prompt, completion = (_side(record[name], role, where) for name, role in zip(PAIR, ("user", ANSWERER), strict=True))
        messages = prompt + completion
        answers = tuple(i for i in range(len(prompt), len(messages)) if messages[i]["role"] == ANSWERER)
        return Conversation(messages, answers)
    return None


def _side(value: Any, role: str, where: str) -> list[dict[str, str]]:
    """Return a prompt or a completion, a text or messages, as messages."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _messages(value, where)
    return _messages([{"role": role, "content": value}], where)


def _messages(values: Sequence[Any], where: str) -> list[dict[str, str]]:
    found = []
    for value in values:
        if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
            raise InvalidValueError(f'{where}: a message must be like {{"role": "user", "content": "..."}}. Fix or remove that conversation.')
        found.append({"role": value["role"], "content": plain_text(value["content"], where)})
    return found


def plain_text(text: str, where: str) -> str:
    r"""Return the text if it can be encoded as UTF-8 (InvalidValueError): JSON can hold halves of surrogate pairs ("\ud800")."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(f"{where}: not Unicode text ({error.reason} at character {error.start}). Fix or remove that document.") from error
    return text
