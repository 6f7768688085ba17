"""Print the requirements that pyproject.toml names, one shell word each: requirements.py build runtime test lint."""

import sys
from pathlib import Path

from pip._vendor import tomli
from pip._vendor.packaging.requirements import Requirement

project = tomli.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = {
    "build": [*project["build-system"]["requires"], "ninja"],
    "runtime": project["project"]["dependencies"],
    **project["project"]["optional-dependencies"],
}
for name in sys.argv[1:]:
    for text in groups[name]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate():
            requirement.marker = None
            sys.stdout.write(str(requirement).replace(" ", "") + "\n")
