"""Every snippet of README and of the site runs as written, page by page, without the network.

`python` blocks of a page run one after the other in one namespace, `sh` blocks line by line: commands of `metalens`. Each page has a folder of
its own, in which `python/` is the repository's, so that the bundled texts have the paths that a clone gives them. Blocks fenced as `bash`, and
indented ones, are for reading only.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = "import sys; from metalens.cli import main; sys.argv[0] = 'metalens'; main()"


def blocks(page):
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def scripts(page):
    """Return what to run for a page: all its Python as one script, then its commands; each as arguments of the interpreter."""
    python = "\n".join(text for kind, text in blocks(page) if kind == "python")
    commands = [line for kind, text in blocks(page) if kind == "sh" for line in text.splitlines() if line.strip()]
    for line in commands:
        words = shlex.split(line, comments=True)
        assert words[0] == "metalens", f"{page.name}: {line}"
        yield ["-c", COMMAND, *words[1:]]
    if python:
        yield ["-c", python]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page, tmp_path):
    (tmp_path / "python").symlink_to(ROOT / "python")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "MPLBACKEND": "Agg", "METALENS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for arguments in scripts(page):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{arguments[-1] if arguments[1] != COMMAND else arguments[2:]}\n{done.stderr[-3000:]}"


def test_python_snippets_are_formatted():
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed here")
    for page in PAGES:
        for kind, text in blocks(page):
            if kind == "python":
                command = [ruff, "format", "--diff", "--line-length", "150", "-"]
                done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{page.name}\n{done.stdout}"
