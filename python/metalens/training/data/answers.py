"""Where the model's answers are in the text that a chat template makes of a conversation.

A template is a program that may do anything with the messages. An answer is found by rendering the conversation up to it, with the template's own
beginning of an answer, and up to its end: it is what the model would have written itself, the token that ends its turn included. Some templates write
an earlier answer otherwise than the last one (they leave thoughts out, or close the conversation). So the answer is also rendered with a mark in the
place of its words, which shows what the template puts around them. A template where neither fits the whole text is refused: a wrong mask would train
on the wrong tokens and say nothing.
"""

from __future__ import annotations

from metalens.models.plain_encoder import PlainEncoder
from metalens.training.data.conversations import Conversation
from metalens.utils.errors import InvalidValueError

MARK = "metalensanswer"


def rendered_answers(encoder: PlainEncoder, chat: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and the characters of it that belong to the answers, [(start, end), ...].

    An answer ends with the mark that ends the model's turn. White space after it is the template's.

    Raises:
        InvalidValueError: if the template refuses the messages, or if an answer cannot be found; names its message.
    """
    text = encoder.chat_text(chat.messages)
    return text, [_span(encoder, chat, number, text) for number in chat.answers]


def _span(encoder: PlainEncoder, chat: Conversation, number: int, text: str) -> tuple[int, int]:
    """Return the characters of an answer."""
    mark = MARK
    while mark in text:
        mark += "x"
    marked = [*chat.messages[:number], {**chat.messages[number], "content": mark}, *chat.messages[number + 1 :]]
    before, after = _around(encoder.chat_text(marked[: number + 1]), mark, number)
    start = _opened(encoder, chat, number, before)
    if not text.startswith(before[:start]):
        raise _not_found(number)
    closed = len(after.rstrip())  # characters after the words that are the model's
    whole = encoder.chat_text(chat.messages[: number + 1])
    if text.startswith(whole) and whole.endswith(after) and len(whole) >= start + len(after):
        return start, len(whole) - len(after) + closed
    around, rest = _around(encoder.chat_text(marked), mark, number)
    fits = len(around) + len(rest) <= len(text) and text.startswith(around) and text.endswith(rest)
    if fits and around in (before, before[:start]) and rest.startswith(after[:closed]):
        return start, len(text) - len(rest) + closed
    raise _not_found(number)


def _around(text: str, mark: str, number: int) -> tuple[str, str]:
    """Return the text before and after the mark (InvalidValueError if it is not there once)."""
    if text.count(mark) != 1:
        raise _not_found(number)
    before, _, after = text.partition(mark)
    return before, after


def _opened(encoder: PlainEncoder, chat: Conversation, number: int, before: str) -> int:
    """Return the number of characters before an answer: before its words, where the template begins it otherwise when the model is to write it."""
    earlier = chat.messages[:number]
    try:
        opened = encoder.chat_text(earlier, answer_begins=True)
    except InvalidValueError:  # many templates refuse a conversation without a message
        return len(before)
    if before.startswith(opened):
        return len(opened)
    if earlier and not before.startswith(encoder.chat_text(earlier)):  # the template does not write the turns one after another
        raise _not_found(number)
    return len(before)


def _not_found(number: int) -> InvalidValueError:
    return InvalidValueError(
        f"The answer in message {number} can't be found in what the chat template makes of the conversation: the template changes it. "
        "Give token ids and the mask of their answers (Corpus.from_ids), or count all tokens (loss_on='all')."
    )
