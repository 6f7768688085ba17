"""Texts, and a place for their tokens."""

import pytest


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def two(tmp_path):
    """Two documents, "ab" and "cdé", as JSON lines."""
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "cdé"}\n')
    return path
