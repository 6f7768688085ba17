"""A tokenizer for preprocessed Metal source that keeps every character and knows each token's file and line."""

from __future__ import annotations

import dataclasses
import re

from .errors import MslError

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/|\#[^\n]*)
    | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<name>[A-Za-z_]\w*)
    | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    | (?P<other>::|->|<<=|<<|>=|<=|==|!=|&&|\|\||\+\+|--|[+\-*/%&|^]=|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)(?:\s+"((?:\\.|[^"\\])*)")?')

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclasses.dataclass
class Token:
    """A token, together with the blanks, comments and line markers before it."""

    text: str
    kind: str
    file: str
    line: int
    before: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def tokenize(source: str) -> list[Token]:
    """Split source into tokens. The last token is empty and carries the text after the last real token."""
    tokens: list[Token] = []
    file, line, before = "source", 1, ""
    for match in _TOKEN.finditer(source):
        text, kind = match[0], str(match.lastgroup)
        if kind == "space":
            before += text
            if text.startswith("#") and (marker := _MARKER.match(text)):
                line = int(marker[1]) - 1  # the newline starts the next line
                file = marker[2] or file
            line += text.count("\n")
            continue
        tokens.append(Token(text, kind, file, line, before))
        before = ""
        line += text.count("\n")
    tokens.append(Token("", "end", file, line, before))
    return tokens


def untokenize(tokens: list[Token]) -> str:
    return "".join(token.before + token.text for token in tokens)


def find_closing(tokens: list[Token], at: int) -> int:
    """Return the index of the bracket that closes the one at `at`."""
    opening = tokens[at].text
    closing, depth = CLOSING[opening], 0
    for i in range(at, len(tokens)):
        if tokens[i].text == opening:
            depth += 1
        elif tokens[i].text == closing:
            depth -= 1
            if depth == 0:
                return i
    raise MslError(f"{tokens[at].place}: error: unbalanced {opening!r}")


def split_at_commas(tokens: list[Token]) -> list[list[Token]]:
    """Split at commas outside all brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        if token.text in ("(", "[", "{", "<"):
            depth += 1
        elif token.text in (")", "]", "}", ">"):
            depth -= 1
        if token.text == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts if parts != [[]] else []
