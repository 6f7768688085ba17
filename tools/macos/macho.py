"""Read the facts about a 64-bit Mach-O file that the macOS check needs: only a Mac has Apple's otool and nm."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

_MAGIC, _ARM64 = 0xFEEDFACF, 0x0100000C
_SYMTAB, _RPATH, _BUILD_VERSION = 0x2, 0x8000001C, 0x32
_LOADS = {0xC, 0x80000018, 0x8000001F, 0x80000023}  # commands that load a dylib: plain, weak, re-exported, upward
_STAB, _PRIVATE, _TYPE, _EXTERNAL = 0xE0, 0x10, 0x0E, 0x01


@dataclass
class MachO:
    """One image: how it was built, which libraries it loads, and which symbols it takes from which library."""

    arm64: bool
    minimum_macos: str = ""
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)  # symbol -> the library that it is bound to; "" if to no particular one
    exports: set[str] = field(default_factory=set)

    def imported_from(self, library: str) -> list[str]:
        """Return the symbols bound to the library of this file name, sorted."""
        return sorted(name for name, path in self.imports.items() if Path(path).name == library)


def read(path: Path) -> MachO:
    """Return the image in the file at `path`.

    Raises:
        ValueError: it is not a 64-bit little-endian Mach-O file.
    """
    data = path.read_bytes()
    if len(data) < 32 or struct.unpack_from("<I", data)[0] != _MAGIC:
        raise ValueError(f"{path} is not a 64-bit Mach-O file")
    cpu, commands = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 16)[0]
    image, offset, table = MachO(arm64=cpu == _ARM64), 32, (0, 0, 0)

    def text(at: int) -> str:
        return data[at : data.index(b"\0", at)].decode()

    for _ in range(commands):
        command, size = struct.unpack_from("<II", data, offset)
        if command in _LOADS:
            image.libraries.append(text(offset + struct.unpack_from("<I", data, offset + 8)[0]))
        elif command == _RPATH:
            image.rpaths.append(text(offset + struct.unpack_from("<I", data, offset + 8)[0]))
        elif command == _BUILD_VERSION:
            version = struct.unpack_from("<I", data, offset + 12)[0]
            image.minimum_macos = f"{version >> 16}.{version >> 8 & 0xFF}"
        elif command == _SYMTAB:
            symbols, count, strings = struct.unpack_from("<III", data, offset + 8)
            table = symbols, count, strings
        offset += size

    symbols, count, strings = table
    for i in range(count):
        name_at, kind, _, description, _ = struct.unpack_from("<IBBHQ", data, symbols + 16 * i)
        if kind & (_STAB | _PRIVATE) or not kind & _EXTERNAL:
            continue
        name = text(strings + name_at)
        if kind & _TYPE:
            image.exports.add(name)
        else:
            # Two-level namespace: the number, from 1, of the library in which the linker found the symbol; 0 and 253 up are special.
            library = description >> 8
            image.imports[name] = image.libraries[library - 1] if 0 < library <= len(image.libraries) else ""
    return image
