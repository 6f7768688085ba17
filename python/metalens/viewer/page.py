"""Write the viewer's page: static modules, style and a document as one HTML file.

The modules are plain JavaScript, in `static/`. A browser could load them one by one; here they are joined, so that the page is a single file. Its
content security policy names the hash of this one script and this one style: nothing else on the page can run, whatever a token says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
FORMAT, VERSION = "metalens.view", 1

TextAndLens = tuple[int, int]  # a trajectory of a page: the numbers of its text and its lens

# `import { a, b } from "./module.js";` and `export ` before a declaration: all that the modules use of the module system.
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=const |let |class |function |async function)", re.MULTILINE)
_DOCTYPE = b"<!doctype html>\n"
# The document of a page: a line of its own, which no other part of the page can hold, because "<" is escaped in it.
_DOCUMENT = re.compile(rb'^<script type="application/json" id="document">([^<]*)</script>$', re.MULTILINE)


def document(
    texts: Sequence[Mapping[str, Any]],
    title: str,
    comparisons: Sequence[Mapping[str, Any]] = (),
    live: Mapping[str, Any] | None = None,
    statistic: str | None = None,
) -> dict[str, Any]:
    """Return what a page shows, as JSON holds it.

    Args:
        texts: one or two of {"name": text, "trajectories": [one for each lens]}, as `Trajectory.to_json` returns them.
        title: name of the model and the lens.
        comparisons: results of `Comparison.to_json`, each with "of": [[text, lens], [text, lens]], the indices of what it compares. The same
            twice = every layer with the next one.
        live: what a served page has to know of its server: "lenses", "max_tokens" and "max_new_tokens". None = the page has no server.
        statistic: name of the statistic that the colors show at first, as "kl" or "layers:js". None = the probability of the top token.
    """
    shown = {"texts": [*texts], "comparisons": [*comparisons], "live": live, "statistic": statistic}
    return {"format": FORMAT, "version": VERSION, "title": title, **shown}


def page(content: Mapping[str, Any]) -> str:
    """Return a document as a complete HTML page, which needs no other file and no network.

    Args:
        content: result of `document`.
    """
    script, style = _script(), (STATIC / "page.css").read_text(encoding="utf-8")
    # In JSON, "<" occurs in strings only. Escaped, no token can end the element or open a comment in it.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "POLICY": html.escape(policy(live=content["live"] is not None)),
        "TITLE": html.escape(f"{content['title']} · metalens"),
        "STYLE": style,
        "DOCUMENT": data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        "SCRIPT": script,
    }
    template = (STATIC / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], template)


def is_page(path: Path) -> bool:
    """Return whether a file is a page that `page` wrote, of any version: it begins as one, and its document says that it is one."""
    with path.open("rb") as file:
        if file.read(len(_DOCTYPE)) != _DOCTYPE:
            return False
        found = _DOCUMENT.search(file.read())
    try:
        content = None if found is None else json.loads(found[1])
    except ValueError:  # also of bytes that are no text
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def policy(*, live: bool) -> str:
    """Return the content security policy of a page.

    Args:
        live: whether the page may ask its own server.
    """
    script, style = (_hash(text) for text in (_script(), (STATIC / "page.css").read_text(encoding="utf-8")))
    asks = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; style-src-attr 'none'; img-src data: blob:; {asks}"
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _script() -> str:
    """Return all modules as one: each after those that it imports, without the import and export words."""
    joined: dict[str, str] = {}

    def add(name: str, above: tuple[str, ...] = ()) -> None:
        if name in joined or name in above:
            return
        text = (STATIC / f"{name}.js").read_text(encoding="utf-8")
        for needed in _IMPORT.findall(text):
            add(needed, (*above, name))
        joined[name] = _EXPORT.sub("", _IMPORT.sub("", text))

    add("main")
    return "\n".join(joined.values())


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
