"""Encode text without special tokens, and find the ids that a tokenizer puts before every text.

Tokenizers of mlx-lm and transformers are recognized by their class names: neither package is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from metalens.utils.errors import InvalidValueError


def is_instance_of(tokenizer: Any, class_name: str) -> bool:
    """Tell whether a class of this name is among an object's classes."""
    return any(each.__name__ == class_name for each in type(tokenizer).__mro__)


def require_unicode(text: str) -> str:
    """Return the text if it can be encoded as UTF-8.

    Raises:
        InvalidValueError: if it cannot; names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(f"The text is not Unicode ({error.reason} at character {error.start}). Fix or remove that character.") from error
    return text


class PlainEncoder:
    """Encodes text without the special tokens that a tokenizer adds.

    Args:
        tokenizer: a tokenizer of transformers or mlx-lm, or any object with `encode(text)`.

    Attributes:
        tokenizer: the tokenizer without mlx-lm's wrapper.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer._tokenizer if is_instance_of(tokenizer, "TokenizerWrapper") else tokenizer

    @cached_property
    def _takes_the_switch(self) -> bool:
        try:
            self.tokenizer.encode("a", add_special_tokens=False)
        except TypeError:
            return False
        return True

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Return the ids that the tokenizer puts before every text, as a rule a beginning-of-sequence token; often none."""
        if not hasattr(self.tokenizer, "encode"):
            return ()
        whole = [int(i) for i in self.tokenizer.encode("a")]
        if self._takes_the_switch:
            plain = [int(i) for i in self.tokenizer.encode("a", add_special_tokens=False)]
        else:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            plain = whole[1:] if bos is not None and whole[:1] == [bos] else whole
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:start])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. They do not depend on the other texts.

        Special tokens that a text spells ("<bos>") become these tokens.
        """
        if is_instance_of(self.tokenizer, "PreTrainedTokenizerBase"):
            # One call: fast tokenizers use all cores for it. Not verbose: a text longer than the model's context is no mistake here.
            options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            found: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"]
            return found
        if self._takes_the_switch:
            return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return [list(self.tokenizer.encode(text))[len(self.prefix) :] for text in texts]

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        """Return the first character of each token of `encode` and the one after its last. None = the tokenizer, not a fast one, does not tell."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return [(int(start), int(end)) for start, end in found]

    @property
    def chat_template(self) -> str:
        """Return the chat template; "" if the tokenizer has none."""
        return str(getattr(self.tokenizer, "chat_template", None) or "")

    def chat_text(self, messages: Sequence[Mapping[str, Any]], answer_begins: bool = False) -> str:
        """Return the text of a conversation in the tokenizer's chat template, special tokens spelled.

        Args:
            messages: messages like {"role": "user", "content": "..."}.
            answer_begins: end where the model's next answer begins.

        Raises:
            InvalidValueError: if the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.chat_template:
            raise InvalidValueError("The tokenizer has no chat template. Give plain text, or use the model's chat version.")
        try:
            text = self.tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False, add_generation_prompt=answer_begins)
        except Exception as error:  # templates raise errors of their own kinds
            raise InvalidValueError(f"The chat template refuses the messages: {error}") from error
        return str(text)

    def without_prefix(self, ids: Any) -> Any:
        """Return ids [T], an array or a list, without the prefix that they begin with; as they are if they do not begin with it."""
        length = len(self.prefix)
        return ids[length:] if length and len(ids) >= length and [int(i) for i in ids[:length]] == list(self.prefix) else ids
