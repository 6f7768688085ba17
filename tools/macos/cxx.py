"""The C++ compiler of the macOS check: `zig c++` for Apple silicon, called with CMake's arguments for Apple's clang and ld. Linking is strict.

Called as `cxx.py ZIG TOOLCHAIN ARGUMENTS...`, by the wrapper that check.py writes into the folder TOOLCHAIN.
"""

import os
import sys
from collections.abc import Sequence

TARGET = "aarch64-macos.14.0"

# Flags of Apple's tools that zig's lack and the check does not need: how they begin, and how many arguments they take.
_DROPPED = {"-arch": 2, "-framework": 2, "-flto": 1, "-mmacosx-version-min": 1, "-Wl,-x": 1, "-Wl,-S": 1, "-Wl,-search_paths_first": 1}
# Frameworks that the extension calls itself. check.py writes a library of their names; metal-cpp asks Objective-C for all others.
_FRAMEWORKS = ("IOKit", "CoreFoundation")
# zig takes a machine's features from the name of a machine.
_RENAMED = {"-bundle": "-shared", "-march=armv8.2-a+bf16": "-mcpu=apple_m2"}
# Flags that let a link pass although no library has a symbol. Extensions list Python's symbols in this way; here those have a library.
_LENIENT = ("-undefined", "dynamic_lookup", "-Wl,-undefined,dynamic_lookup", "-Wl,-undefined,suppress", "-Wl,-flat_namespace", "-Wl,-U,")


def translate(arguments: Sequence[str], toolchain: str) -> list[str]:
    """Translate arguments of Apple's clang++ to arguments of `zig c++`.

    Raises:
        ValueError: if an argument would let a link pass although a symbol is missing.
    """
    translated, libraries, i = [], [], 0
    while i < len(arguments):
        argument = arguments[i]
        if argument.startswith(_LENIENT):
            raise ValueError(f"{argument} would hide a symbol that is missing, which is what this check is for")
        if argument == "-framework" and arguments[i + 1] in _FRAMEWORKS:
            libraries.append(f"-l{arguments[i + 1]}")
        dropped = next((count for flag, count in _DROPPED.items() if argument == flag or (count == 1 and argument.startswith(flag))), 0)
        # nanobind's list of Python's symbols, for which libpython.tbd stands here
        if dropped or (argument.startswith("-Wl,@") and argument.endswith(".sym")):
            i += max(dropped, 1)
            continue
        translated.append(_RENAMED.get(argument, argument))
        i += 1
    links = not {"-c", "-E", "-S", "-M", "-MM"} & set(arguments)
    return [
        *("-target", TARGET, "-isystem", f"{toolchain}/include"),
        *translated,
        *((f"-L{toolchain}/lib", *libraries, "-lobjc", "-lpython") if links and "-shared" in translated else ()),
    ]


if __name__ == "__main__":
    zig, folder, *rest = sys.argv[1:]
    os.execv(zig, [zig, "c++", *translate(rest, folder)])
