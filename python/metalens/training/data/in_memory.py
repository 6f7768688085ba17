"""Documents in memory: texts and conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metalens.training.data.conversations import CHAT_FIELDS, conversation_of, plain_text
from metalens.training.data.readers import Identity, Memory, Piece, Source, parts
from metalens.utils.errors import InvalidValueError


class TextList(Source):
    """Texts in memory, each a document.

    Args:
        texts: the texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.name = f"{len(self.texts)} texts"

    def identity(self, memory: Memory | None = None) -> Identity:
        """Return the number, size and SHA-256 of the texts."""
        sha256, size = hashlib.sha256(), 0
        for text in self.texts:
            encoded = text.encode("utf-8", "surrogatepass")
            sha256.update(len(encoded).to_bytes(8, "little") + encoded)
            size += len(encoded)
        return {"kind": "texts", "documents": len(self.texts), "bytes": size, "sha256": sha256.hexdigest()}

    def pieces(self) -> Iterator[Piece]:
        """Yield one document per text."""
        if not any(text.strip() for text in self.texts):
            raise InvalidValueError("The texts are empty or blank. Give texts with content.")
        for number, text in enumerate(self.texts):
            for part in parts(plain_text(text, f"text {number}")):
                yield part._replace(where=f"text {number}")


class ChatList(Source):
    """Conversations in memory, each a document.

    Args:
        conversations: lists of messages, or records with "messages" or with "prompt" and "completion", as `conversation_of` takes them.

    Raises:
        InvalidValueError: if one of them is no conversation.
    """

    def __init__(self, conversations: Sequence[Any]) -> None:
        self.conversations = []
        for number, given in enumerate(conversations):
            record = given if isinstance(given, Mapping) else {CHAT_FIELDS[0]: given}
            found = next((chat for field in CHAT_FIELDS if (chat := conversation_of(record, field, f"conversation {number}")) is not None), None)
            if found is None:
                raise InvalidValueError(
                    f"conversation {number}: expected a list of messages, or an object with 'messages' or with 'prompt' and 'completion'; "
                    f"got {', '.join(map(repr, record)) or 'an empty object'}."
                )
            self.conversations.append(found)
        self.name = f"{len(self.conversations)} conversations"

    def identity(self, memory: Memory | None = None) -> Identity:
        """Return the number and SHA-256 of the conversations."""
        sha256 = hashlib.sha256()
        for chat in self.conversations:
            sha256.update(json.dumps([chat.messages, chat.answers]).encode())
        return {"kind": "conversations", "documents": len(self.conversations), "sha256": sha256.hexdigest()}

    def pieces(self) -> Iterator[Piece]:
        """Yield one document per conversation."""
        for number, chat in enumerate(self.conversations):
            yield Piece("", starts=True, chat=chat, where=f"conversation {number}")
