"""A report as data, and as Markdown, HTML and JSON. Every number knows the file and the key that it comes from."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np

from metalens.display.format import decimals
from metalens.utils.errors import InvalidValueError

MARK = "written by metalens sweep"  # in every form of a report: such a file may be replaced


@dataclass(frozen=True)
class Number:
    """A number of the report.

    Attributes:
        value: the number.
        file: path of the JSON file that it comes from, relative to the report.
        key: where it is in the file, see `value_at`.
        shown: function that returns it as text.
    """

    value: float
    file: str
    key: str
    shown: Callable[[float], str] = decimals

    def __str__(self) -> str:
        return self.shown(self.value)


Entry: TypeAlias = str | Number


@dataclass(frozen=True)
class Table:
    """A table of a report: headings, and rows of as many entries."""

    headings: list[str]
    rows: list[list[Entry]]


@dataclass(frozen=True)
class Picture:
    """A picture of a report: a file beside it, and a caption that says what its values are."""

    file: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def number_at(result: Mapping[str, Any], file: str, key: str, shown: Callable[[float], str] = decimals) -> Number:
    """Return the number at a key of a result, with its origin."""
    return Number(value_at(result, key), file, key, shown)


def values_at(data: Any, key: str) -> list[float]:
    """Return the numbers at a key: names with dots between them, where `layers[tuned]` are the entries of a list that have 'tuned'.

    Raises:
        InvalidValueError: if there is none.
    """
    found = [data]
    for part in key.split("."):
        name, _, wanted = part.rstrip("]").partition("[")
        found = [each[name] for each in found if isinstance(each, Mapping) and name in each]
        if wanted:
            found = [entry for entries in found for entry in entries if wanted in entry]
    if not found:
        raise InvalidValueError(f"There is no {key} in the result.")
    return [float(each) for each in found]


def value_at(data: Any, key: str) -> float:
    """Return the mean of the numbers at a key: see `values_at`."""
    return float(np.mean(values_at(data, key)))


# ------------------------------------------------------------------ forms


def numbers(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Return every number of a report, with its place and its origin, as JSON holds it."""
    return [
        {"section": section.title, "table": title, "row": str(row[0]), "column": heading, "value": entry.value, "file": entry.file, "key": entry.key}
        for section in sections
        for title, table in section.tables
        for row in table.rows
        for heading, entry in zip(table.headings, row, strict=True)
        if isinstance(entry, Number)
    ]


def origins(table: Table) -> dict[str, str]:
    """Return {heading: key} of the columns of a table that hold numbers."""
    return {heading: entry.key for row in table.rows for heading, entry in zip(table.headings, row, strict=True) if isinstance(entry, Number)}


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return a report as Markdown. Every number is a link to its file."""
    return "\n".join(_markdown_lines(title, sections)).rstrip() + "\n"


def _markdown_lines(title: str, sections: Sequence[Section]) -> Iterator[str]:
    yield f"# {_plain(title)}\n\n<!-- {MARK} -->\n"
    for section in sections:
        yield f"## {_plain(section.title)}\n"
        yield from (f"{paragraph}\n" for paragraph in section.paragraphs)
        for name, table in section.tables:
            yield f"**{_plain(name)}**\n"
            yield "| " + " | ".join(map(_plain, table.headings)) + " |"
            yield "|" + "---|" * len(table.headings)
            for row in table.rows:
                yield "| " + " | ".join(f"[{entry}]({quote(entry.file)})" if isinstance(entry, Number) else _plain(entry) for entry in row) + " |"
            yield ""
            yield "".join(f"- {_plain(heading)}: `{key}`\n" for heading, key in origins(table).items())
        yield from (f"![{_plain(picture.caption)}]({quote(picture.file)})\n" for picture in section.pictures)


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; } figcaption, .keys { font-size: 13px; opacity: .8; }
.wide { overflow-x: auto; } td a { color: inherit; text-decoration: underline dotted; }
"""


def html_page(title: str, sections: Sequence[Section], folder: Path) -> str:
    """Return a report as one HTML page with its pictures inside. Every number is a link to its file, and shows its key.

    Args:
        title: title of the report.
        sections: the report.
        folder: folder of the report, where the pictures are.

    Raises:
        OSError: if a picture can't be read.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f"<meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{policy}\"><title>{html.escape(title)}</title>"
    body = "\n".join(line for section in sections for line in _html_lines(section, folder))
    start = f"<!doctype html><!-- {MARK} --><html lang='en'><head>{head}<style>{STYLE}</style></head>"
    return f"{start}\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"


def _html_lines(section: Section, folder: Path) -> Iterator[str]:
    yield f"<h2>{html.escape(section.title)}</h2>"
    yield from (f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs)
    for name, table in section.tables:
        yield f"<h3>{html.escape(name)}</h3><div class='wide'><table>"
        yield "<tr>" + "".join(f"<th>{html.escape(each)}</th>" for each in table.headings) + "</tr>"
        yield from ("<tr>" + "".join(f"<td>{_html_entry(entry)}</td>" for entry in row) + "</tr>" for row in table.rows)
        yield "</table></div>"
        keys = "; ".join(f"{html.escape(heading)}: <code>{html.escape(key)}</code>" for heading, key in origins(table).items())
        yield f"<p class='keys'>{keys}</p>" if keys else ""
    for picture in section.pictures:
        data = base64.b64encode((folder / picture.file).read_bytes()).decode()
        caption = html.escape(picture.caption, quote=True)
        yield f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>"


def _html_entry(entry: Entry) -> str:
    if isinstance(entry, str):
        return html.escape(entry)
    return f"<a href='{html.escape(quote(entry.file), quote=True)}' title='{html.escape(entry.key, quote=True)}'>{html.escape(str(entry))}</a>"
