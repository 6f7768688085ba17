"""Download, clean and split the text behind the demo model.

    python corpus.py WORKDIR

Every source is documentation or prose that Debian ships under a free license. The script fetches packages with ``apt-get download`` and
unpacks them beside each other; it installs nothing. A document is one HTML or Mallard page reduced to its paragraphs. Code blocks, tables,
navigation and all other text that does not read as a sentence are dropped, because people read the demo's output.

Writes into WORKDIR:
    corpus.jsonl     {"source", "document", "repeat", "text"} per line: the model's training text
    lens_train.txt   about 1 MB of the same documents, for training lenses
    heldout.txt      about 200 KB from documents that are in neither of these files
    valid.jsonl      more held-out documents, for the model's loss during training
    sources.json     package versions and character counts, for the attribution file
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import etree
from lxml import html as lxml_html


@dataclass(frozen=True)
class Source:
    """A Debian package whose documents the corpus contains."""

    package: str
    pattern: str  # glob pattern of the pages, below the unpacked package
    license: str
    repeat: float  # passes over each document per epoch: prose is repeated more than reference pages
    bundled: bool = False  # whether lens_train.txt and heldout.txt draw on it


SOURCES = (
    Source("anarchism", "usr/share/doc/anarchism/html/*.html", "GPL-2+", 2.0, bundled=True),
    Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "GPL-2+ or CC-BY-SA-3.0", 3.0, bundled=True),
    Source("sqlite3-doc", "usr/share/doc/sqlite3/**/*.html", "public domain", 1.5, bundled=True),
    Source("gnome-user-docs", "usr/share/help/C/**/*.page", "CC-BY-SA-3.0", 2.0, bundled=True),
    Source("developers-reference", "usr/share/developers-reference/*.html", "GPL-2+", 2.0),
    Source("debian-reference-en", "usr/share/debian-reference/*.en.html", "GPL-2+", 1.5),
    Source("debian-faq", "usr/share/doc/debian/FAQ/*.html", "SPI documentation license", 2.0),
    Source("debian-policy", "usr/share/doc/debian-policy/policy.html/*.html", "GPL-2+", 1.5),
    Source("debian-history", "usr/share/doc/debian-history/docs/*.en.html", "GPL-2+", 2.0),
    Source("maint-guide", "usr/share/doc/maint-guide/html/*.en.html", "GPL-2+", 1.5),
    Source("harden-doc", "usr/share/doc/harden-doc/html/en-US/*.html", "GPL-2", 2.0),
    Source("installation-guide-amd64", "usr/share/doc/installation-guide-amd64/en/*.html", "GPL-2", 2.0),
    Source("git-doc", "usr/share/doc/git-doc/**/*.html", "GPL-2", 1.0),
    Source("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", "PostgreSQL license", 1.0),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/**/*.html", "PSF-2", 1.0),
    Source("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html", "Apache-2.0", 1.0),
    Source("libreoffice-help-en-us", "**/en-US/text/**/*.html", "MPL-2.0", 0.7),
)

LENS_TRAIN_CHARS = 1_000_000
HELDOUT_CHARS = 200_000
VALID_CHARS = 400_000
HELDOUT_FRACTION = 1 / 16  # fraction of every source's documents, chosen by a hash of their names

BLOCKS = {"p", "li", "dd", "h1", "h2", "h3", "h4", "title", "blockquote"}
DROPPED = {
    "script", "style", "pre", "table", "nav", "header", "footer", "form", "svg", "math", "code-block",
    "screen", "code", "info", "links", "head", "button", "select", "media",
}  # fmt: skip
# HTML's inline <code> is part of its sentence and is kept. Mallard's <code> is a block and is dropped.
HTML_DROPPED = DROPPED - {"code"}
NAVIGATION = re.compile(r"nav|toc|menu|footer|header|sidebar|related|fancy_toc|breadcrumb|index", re.I)
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\u00a0": " ", "\u00ad": "", "¶": "", "\u200b": ""})


def fetch(package: str, workdir: Path) -> tuple[Path, str]:
    """Download and unpack one package; return its root and its version."""
    root = workdir / "unpacked" / package
    if not root.exists():
        debs = workdir / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deb = next(debs.glob(f"{package}_*.deb"))
        root.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    deb = next((workdir / "debs").glob(f"{package}_*.deb"))
    return root, deb.name.split("_")[1].replace("%3a", ":")


def local(tag: object) -> str:
    """Return the tag's name without its namespace ('' for comments)."""
    return etree.QName(tag).localname.lower() if isinstance(tag, str) else ""


def is_block(element: etree._Element) -> bool:
    """Return whether the element is a paragraph or a heading; in Publican's books (debian-handbook, harden-doc), `<div class="para">` is one."""
    name = local(element.tag)
    return name in BLOCKS or (name == "div" and "para" in (element.get("class") or "").split())


def prune(root: etree._Element, dropped: set[str]) -> None:
    """Remove elements with these names, comments and navigation from a page, and keep the text that follows them."""
    for element in list(root.iter()):
        if element.getparent() is None:
            continue
        marks = f"{element.get('class') or ''} {element.get('id') or ''} {element.get('role') or ''}"
        navigation = local(element.tag) in {"div", "ul", "p", "span"} and NAVIGATION.search(marks)
        if not isinstance(element.tag, str) or local(element.tag) in dropped or navigation:
            tail = element.tail or ""
            previous, parent = element.getprevious(), element.getparent()
            if previous is not None:
                previous.tail = (previous.tail or "") + tail
            else:
                parent.text = (parent.text or "") + tail
            parent.remove(element)


def paragraphs(path: Path) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is a heading, text) for every block of a page that contains no other block."""
    try:
        if path.suffix == ".page":
            root = etree.parse(str(path), etree.XMLParser(resolve_entities=False, recover=True)).getroot()
            prune(root, DROPPED)
        else:
            root = lxml_html.fromstring(path.read_bytes().decode("utf-8", "ignore").encode())
            prune(root, HTML_DROPPED)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError):
        return
    for element in root.iter():
        name = local(element.tag)
        if is_block(element) and not any(is_block(child) for child in element.iterdescendants()):
            text = unicodedata.normalize("NFKC", "".join(element.itertext())).translate(PLAIN)
            yield name.startswith(("h", "t")), re.sub(r"\s+", " ", text).strip()


def reads_as_prose(text: str) -> bool:
    """Return whether a text looks like a sentence: long, mostly letters, and ended by punctuation."""
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return len(text) >= 60 and letters >= 0.88 * len(text) and text[-1] in '.!?:;")' and text.count(" ") >= 8


def document(path: Path, seen: set[str]) -> str:
    """Return the page as paragraphs separated by blank lines, without paragraphs seen before (boilerplate, mirrored pages)."""
    lines: list[str] = []
    heading = ""
    for is_heading, text in paragraphs(path):
        if is_heading:
            heading = text if text.isascii() and len(text) < 100 else ""
        elif reads_as_prose(text) and text not in seen:
            seen.add(text)
            if heading and heading not in seen:
                lines.append(heading)
            heading = ""
            lines.append(text)
    return "\n\n".join(lines) + "\n" if sum(map(len, lines)) >= 400 else ""


def held_out(name: str) -> bool:
    """Return whether the document of this name is held out."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 1000 * HELDOUT_FRACTION


def main(workdir: Path) -> None:
    """Write the corpus, the held-out documents and the lens texts."""
    train: list[dict[str, object]] = []
    held: list[dict[str, object]] = []
    seen: set[str] = set()
    report: dict[str, dict[str, object]] = {}
    for source in SOURCES:
        root, version = fetch(source.package, workdir)
        count = 0
        for path in sorted(root.glob(source.pattern)):
            if not path.is_file() or (path.suffix == ".page" and "/C/" not in str(path)):
                continue
            text = document(path, seen)
            if not text:
                continue
            name = f"{source.package}/{path.relative_to(root)}"
            entry = {"source": source.package, "document": name, "repeat": source.repeat, "bundled": source.bundled, "text": text}
            (held if held_out(name) else train).append(entry)
            count += len(text)
        report[source.package] = {"version": version, "license": source.license, "characters": count, "repeat": source.repeat}
        sys.stderr.write(f"{source.package:28s} {version:30s} {count / 1e6:6.2f} M characters\n")

    def ordered(entries: list[dict[str, object]], bundled: bool) -> list[dict[str, object]]:
        return sorted((e for e in entries if e["bundled"] or not bundled), key=lambda e: hashlib.sha256(str(e["document"]).encode()).hexdigest())

    def take(entries: list[dict[str, object]], size: int) -> tuple[str, list[dict[str, object]]]:
        """Return about `size` characters from the first entries, and the other entries.

        The entries are in random order, so each source contributes in proportion to its size.
        """
        text, rest = "", []
        for entry in entries:
            if len(text) < size and len(str(entry["text"])) < size / 4:
                text += f"{entry['text']}\n"
            else:
                rest.append(entry)
        return text, rest

    heldout_text, rest = take(ordered(held, True), HELDOUT_CHARS)
    bundled = {str(e["document"]) for e in rest}
    valid = [e for e in held if not e["bundled"] or str(e["document"]) in bundled]
    lens_text, _ = take(ordered(train, True), LENS_TRAIN_CHARS)
    (workdir / "lens_train.txt").write_text(lens_text)
    (workdir / "heldout.txt").write_text(heldout_text)
    (workdir / "sources.json").write_text(json.dumps(report, indent=2))
    for name, entries in (("corpus", train), ("valid", ordered(valid, False))):
        with (workdir / f"{name}.jsonl").open("w") as out:
            size = 0
            for entry in entries:
                if name == "valid" and size > VALID_CHARS:
                    break
                size += len(str(entry["text"]))
                out.write(json.dumps(entry) + "\n")
        sys.stderr.write(f"{name}: {size / 1e6:.2f} M characters\n")
    sys.stderr.write(f"lens_train: {len(lens_text) / 1e6:.2f} M, heldout: {len(heldout_text) / 1e6:.2f} M characters\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
