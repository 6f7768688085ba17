"""Write the .metal files of the ahead-of-time library and the list of their kernels. CMake compiles them if there is a Metal compiler."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "python"


def main() -> None:
    """Write one file per format of weights, and kernels.json, into the folder --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    # A build environment has only mlx and numpy, which is all that the descriptors need.
    sys.path.insert(0, str(SOURCES))
    from metalens.ops.metal import library

    out.mkdir(parents=True, exist_ok=True)
    units = library.translation_units()
    for name, kernels in units.items():
        (out / f"{name}.metal").write_text(library.text(kernels))
    (out / "kernels.json").write_text(json.dumps([k.name for kernels in units.values() for k in kernels], indent=1) + "\n")


if __name__ == "__main__":
    main()
