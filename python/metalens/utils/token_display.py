"""Show the text of a token on one line, so that different tokens look different: for tables, pictures and pages alike."""

from __future__ import annotations

import re
import unicodedata

# The columns of a terminal that a token takes in a table or a picture.
MAX_WIDTH = 12
SPACE = "␣"
SIGNS = {"\n": "⏎", "\t": "⇥"}
# The carrier of a combining mark that has no character of its own token to stand on.
CARRIER = "◌"
# Bytes that are spelled one by one, as parts of characters are.
SPELLED_BYTES = re.compile("(?:<0x[0-9A-F]{2}>){2,}")
# Categories of characters that cannot be seen: formats, surrogates, unassigned, private, separators.
HIDDEN = ("Cf", "Cs", "Cn", "Co", "Zl", "Zp", "Zs")


def visible(token: str) -> str:
    """Return a token as visible characters on one line, whole.

    Line ends, tabs and spaces at the ends get a sign. Control characters, and others that show nothing or turn the
    direction of the text, are spelled: <0x1B>, <U+202E>. So are characters that look like the signs. A mark that combines
    with the character before it gets a carrier if it comes first. Letters of every script stay as they are.
    """
    body = token.strip(" ")
    start = len(token) - len(token.lstrip(" "))
    end = len(token) - start - len(body) if body else 0
    shown = SPELLED_BYTES.sub(lambda found: found[0].replace("><0x", ""), "".join(map(_visible, body)))  # <0xE6><0x97> is <0xE697>
    if body and unicodedata.category(body[0]) in ("Mn", "Mc", "Me"):
        shown = CARRIER + shown
    return f"{SPACE * start}{shown}{SPACE * end}"


def readable(token: str) -> str:
    """Return `visible` in at most MAX_WIDTH columns; a longer token is cut, and ends with an ellipsis."""
    return cut(visible(token))


def cut(shown: str, width: int = MAX_WIDTH) -> str:
    """Return a text that takes at most `width` columns of a terminal; a longer one is cut, and ends with an ellipsis."""
    if columns_of(shown) <= width:
        return shown
    taken = 0
    for i, character in enumerate(shown):
        taken += _columns(character)
        if taken > width - 1:
            return shown[:i] + "…"
    return shown


def columns_of(shown: str) -> int:
    """Return the columns that a text takes in a terminal: two for wide characters, none for combining marks."""
    return sum(map(_columns, shown))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _visible(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    if character in (SPACE, CARRIER, *SIGNS.values()):
        return f"<U+{ord(character):04X}>"
    kind = unicodedata.category(character)
    if kind == "Cc":
        return f"<0x{ord(character):02X}>"
    return f"<U+{ord(character):04X}>" if kind in HIDDEN and character != " " else character
