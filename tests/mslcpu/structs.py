"""Read the structures of preprocessed Metal source: their members, and the address spaces of their constructors."""

from __future__ import annotations

import dataclasses
import itertools

from .tokens import Token, find_closing


@dataclasses.dataclass
class Constructor:
    """A constructor without an address space, and the members that it initializes by name."""

    token: Token
    initialized: set[str]


@dataclasses.dataclass
class Struct:
    """A structure.

    Attributes:
        members: (name of the type, name of the member); pointers and references are left out.
        generic_constructors: those without an address space.
        spaces: the address spaces of all constructors; "" for none.
    """

    name: str
    members: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    generic_constructors: list[Constructor] = dataclasses.field(default_factory=list)
    spaces: set[str] = dataclasses.field(default_factory=set)

    @property
    def is_thread_only(self) -> bool:
        """Whether it has constructors, and all of them are declared `thread`."""
        return self.spaces == {"thread"}


def structs(tokens: list[Token]) -> list[Struct]:
    """Return the structures that the source defines."""
    found = []
    for i, token in enumerate(tokens[:-2]):
        if token.text not in ("struct", "class") or tokens[i + 1].kind != "name":
            continue
        opening = next((j for j in range(i + 2, len(tokens)) if tokens[j].text in ("{", ";", ">", ")", "=", ",", "(", "*", "&")), None)
        if opening is not None and tokens[opening].text == "{":
            found.append(_struct(tokens[i + 1].text, tokens[opening + 1 : find_closing(tokens, opening)]))
    return found


def _struct(name: str, body: list[Token]) -> Struct:
    struct = Struct(name)
    start = i = 0
    while i < len(body):
        text = body[i].text
        if text == "{":  # a method's body, or a nested structure
            end = find_closing(body, i)
            _declaration(struct, body[start:i])
            i = end
            start = i + 1
        elif text == ";":
            _declaration(struct, body[start:i])
            start = i + 1
        elif text == ":" and i > 0 and body[i - 1].text in ("public", "private", "protected"):
            start = i + 1
        i += 1
    return struct


def _declaration(struct: Struct, tokens: list[Token]) -> None:
    """Add what one declaration says: a constructor or a member."""
    if not tokens:
        return
    if tokens[0].text == "template" and len(tokens) > 1 and tokens[1].text == "<":
        tokens = tokens[find_closing(tokens, 1) + 1 :]
    words = [t.text for t in tokens]
    while words and words[0] in ("METAL_FUNC", "inline", "explicit", "constexpr", "__attribute__", "const"):
        skipped = 1 if words[0] != "__attribute__" else find_closing(tokens, 1) + 1
        tokens, words = tokens[skipped:], words[skipped:]
    if len(words) > 1 and words[0] == struct.name and words[1] == "(":
        end = find_closing(tokens, 1)
        after = words[end + 1 :]
        space = after[0] if after and after[0] in ("thread", "threadgroup", "device", "constant") else ""
        struct.spaces.add(space)
        if not space:
            initialized = {word for word, following in itertools.pairwise(after) if following in ("(", "{")}
            struct.generic_constructors.append(Constructor(tokens[0], initialized))
    elif words and "(" not in words and not {"static", "using", "typedef", "struct", "class", "enum", "*", "&", "friend"} & set(words):
        name = words[: words.index("[")][-1] if "[" in words else words[-1]
        kind = next((w for w, t in zip(words, tokens, strict=True) if t.kind == "name" and w not in ("metal", "metalens")), "")
        if kind != name:
            struct.members.append((kind, name))
