"""Hooks for mkdocs (see mkdocs.yml): pages from the tutorial's notebook and from the command line, and a check that the site needs no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tutorial.ipynb"
HELP_MARK = "<!-- help of every command -->"
# What a browser loads by itself: scripts, pictures, frames, and with `link` style sheets and fonts.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preconnect)[^>]*//[^"'>]+"""
)


class PlainBrackets(griffe.Extension):
    """Keeps the indices [translator][layer] in docstrings from being read as a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escape the brackets between two indices, except in code."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(`[^`]*`)|\]\[", lambda match: match[1] or "]\\[", obj.docstring.value)


def on_files(files: Files, config: Any) -> Files:
    """Add tutorial.md and its pictures, from the notebook with its outputs."""
    text, resources = MarkdownExporter().from_filename(str(NOTEBOOK), {"unique_key": "tutorial", "output_files_dir": "tutorial"})
    files.append(File.generated(config, "tutorial.md", content=text))
    for name, data in resources["outputs"].items():
        files.append(File.generated(config, name, content=data))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help texts of the command line in place of their mark."""
    return markdown.replace(HELP_MARK, "\n\n".join(_help_texts())) if HELP_MARK in markdown else markdown


def _help_texts() -> Iterator[str]:
    from metalens.cli import main

    parent = click.Context(main, info_name="metalens", max_content_width=100, terminal_width=100)
    yield f"```text\n{main.get_help(parent)}\n```"
    yield from _help_of_commands(main, parent)


def _help_of_commands(group: click.Group, parent: click.Context) -> Iterator[str]:
    """Yield the help of every command of a group, and of those of groups in it."""
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```"
        if isinstance(command, click.Group):
            yield from _help_of_commands(command, context)


def on_post_build(config: Any) -> None:
    """Fail if a page would load anything from another server."""
    found = [
        f"{page.relative_to(config.site_dir)}: {match[0]}"
        for page in sorted(Path(config.site_dir).rglob("*.html"))
        for match in LOADED.finditer(page.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("The site must work without the network, but these pages load something from it:\n" + "\n".join(found))
