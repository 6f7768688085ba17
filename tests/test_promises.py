"""Every promise of docs/reference/promises.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "promises.md"
ROWS = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [A-Z]", line)]


def test_the_page_has_promises():
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_a_promise_has_a_test(row):
    tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[-1])
    assert tests
    for file, name in tests:
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
