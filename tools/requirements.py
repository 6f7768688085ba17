"""Print the requirements of pyproject.toml's groups, one a line, for pip: requirements.py build runtime test lint."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = {
    "build": [*project["build-system"]["requires"], "ninja"],
    "runtime": project["project"]["dependencies"],
    **project["project"]["optional-dependencies"],
}
for name in sys.argv[1:]:
    sys.stdout.write("".join(f"{requirement}\n" for requirement in groups[name]))
