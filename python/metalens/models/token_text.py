"""The text of one token: different for different tokens, also for parts of characters and for ids that the tokenizer does not know."""

from __future__ import annotations

import codecs
from functools import cache
from typing import Any

REPLACEMENT = "\ufffd"
WORD_START = "\u2581"  # SentencePiece's sign for a space


def token_text(tokenizer: Any, token_id: int) -> str:
    """Return the text of a token.

    Bytes that are a part of a character are spelled "<0xE6>". A space at the start of a word is kept, also where the tokenizer drops it at the start
    of a text. An id that the tokenizer cannot decode is spelled "<310>".

    Args:
        tokenizer: the tokenizer, without mlx-lm's wrapper.
        token_id: id of the token.
    """
    try:
        text = tokenizer.decode([token_id])
    except Exception:  # heads have more rows than tokenizers have tokens, and tokenizers raise all kinds of errors for them
        text = None
    piece = _piece(tokenizer, token_id)
    if isinstance(text, str) and text and REPLACEMENT not in text:
        spaces = len(piece) - len(piece.lstrip(WORD_START))
        return " " * spaces + text.lstrip(" ") if spaces else text
    if REPLACEMENT in piece:
        return piece
    if piece.startswith("<0x") and piece.endswith(">"):
        return piece
    if text == "" and piece and not piece.strip(WORD_START):
        return " " * len(piece)
    raw = _bytes_of(piece)
    if raw:
        return raw.decode("utf-8", errors="metalens-bytes")
    return piece or (text if text and isinstance(text, str) else f"<{token_id}>")


def is_token_text(tokenizer: Any, token_id: int, text: str) -> bool:
    """Return whether a text is that of a token: as `token_text` tells it, or as the entry of a byte-level vocabulary spells it.

    Both differ where the tokenizer drops a space before a punctuation mark when it decodes.
    """
    return text == token_text(tokenizer, token_id) or _bytes_of(_piece(tokenizer, token_id)) == text.encode("utf-8", errors="surrogatepass")


def _piece(tokenizer: Any, token_id: int) -> str:
    """Return the entry of the vocabulary; "" if the tokenizer does not tell."""
    try:
        piece = tokenizer.convert_ids_to_tokens(token_id)
    except Exception:  # the tokenizer has no such method, or no such token
        return ""
    if isinstance(piece, bytes):
        return piece.decode("utf-8", errors="metalens-bytes")
    return piece if isinstance(piece, str) else ""


@cache
def _byte_values() -> dict[str, int]:
    """Return {character: byte} of byte-level vocabularies (GPT-2): printable characters stand for themselves, others follow from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _bytes_of(piece: str) -> bytes | None:
    values = _byte_values()
    return bytes(values[c] for c in piece) if piece and all(c in values for c in piece) else None


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("metalens-bytes", _spelled)
