"""Tokens on one line: everything visible, different tokens different, at most MAX_WIDTH columns."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.utils.token_display import MAX_WIDTH, columns_of, readable, visible

SHOWN = {
    " the": "␣the",
    "the": "the",
    "\n": "⏎",
    "  ": "␣␣",
    "": "",
    " a\tb ": "␣a⇥b␣",
    "x" * 40: "x" * (MAX_WIDTH - 1) + "…",
    "\x1b[31m": "<0x1B>[31m",
    "\x9b": "<0x9B>",
    "\r": "<0x0D>",
    "\u202e": "<U+202E>",
    "\u200b": "<U+200B>",
    "\u00a0": "<U+00A0>",
    "<0xE6><0x97>": "<0xE697>",
    "\u2423": "<U+2423>",  # the sign of a space is not a space
    "\u23ce": "<U+23CE>",
    "\u0301": "\u25cc\u0301",  # a combining mark on its own
    "e\u0301": "e\u0301",
    "\u05e9\u05dc\u05d5\u05dd": "\u05e9\u05dc\u05d5\u05dd",  # right to left, as it is
    "\u6771\u4eac\u90fd" * 3: "\u6771\u4eac\u90fd\u6771\u4eac\u2026",  # two columns for each
}


@pytest.mark.parametrize("token", SHOWN)
def test_tokens_stay_visible_and_short(token):
    assert readable(token) == SHOWN[token]


@given(st.text(max_size=30))
def test_every_text_is_one_visible_line(text):
    shown = visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in shown)
    assert columns_of(readable(text)) <= MAX_WIDTH
    assert bool(shown) == bool(text)


def test_spaces_at_the_ends_are_told_apart():
    assert len({visible(text) for text in ("a", " a", "a ", "  a", "\u2423a", "\u00a0a", "\na", "\ta")}) == 8
