"""Stand in for Apple's Metal compiler in the macOS check, as `xcrun -sdk macosx metal`: show that CMake calls it, and compile nothing.

It rejects what the real compiler rejects without reading a kernel: a missing source or included file, and two objects of one name. Its output is no
Metal library. For every other tool it fails, as xcrun does without Xcode.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def included(source: Path, folders: Sequence[Path]) -> set[Path]:
    """Return every file that `source` includes by "name", at any depth.

    Raises:
        FileNotFoundError: one of them is neither beside the file that includes it nor in `folders`.
    """
    found: set[Path] = set()
    pending = [source]
    while pending:
        file = pending.pop()
        for name in _INCLUDE.findall(file.read_text()):
            path = next((folder / name for folder in (file.parent, *folders) if (folder / name).is_file()), None)
            if path is None:
                raise FileNotFoundError(f"{file} includes {name}, which is not in {file.parent} nor in {[str(folder) for folder in folders]}")
            if path.resolve() not in found:
                found.add(path.resolve())
                pending.append(path)
    return found


def metal(arguments: Sequence[str]) -> None:
    """Write the files that `metal` would write: the object and its list of dependencies, or a library."""
    output = Path(arguments[arguments.index("-o") + 1])
    if "-c" in arguments:
        source = Path(arguments[arguments.index("-c") + 1])
        headers = included(source, [Path(argument[2:]) for argument in arguments if argument.startswith("-I")])
        if "-MF" in arguments:
            Path(arguments[arguments.index("-MF") + 1]).write_text(f"{output}: {' '.join(map(str, [source, *sorted(headers)]))}\n")
        output.write_bytes(b"no object")
    else:
        objects = [argument for argument in arguments if argument.endswith(".air")]
        if not objects or len(set(objects)) != len(objects):
            raise ValueError(f"a library needs objects, each once, not {objects}")
        for path in objects:
            Path(path).read_bytes()
        output.write_bytes(b"no library")


if __name__ == "__main__":
    if sys.argv[1:4] != ["-sdk", "macosx", "metal"]:
        sys.exit(72)
    if sys.argv[4:] != ["--version"]:
        try:
            metal(sys.argv[4:])
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
