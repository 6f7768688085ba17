"""Print the requirements of pyproject.toml's groups for pip, one per line: requirements.py build runtime test lint."""

import argparse
import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print the requirements of the named groups."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    groups = {
        "build": [*project["build-system"]["requires"], "ninja"],
        "runtime": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", choices=list(groups))
    for name in parser.parse_args().groups:
        sys.stdout.write("".join(f"{requirement}\n" for requirement in groups[name]))


if __name__ == "__main__":
    main()
