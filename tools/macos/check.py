"""Compile and link the extension on Linux as a Mac with Apple silicon would. A call that MLX's headers or libmlx's exports lack is an error.

    .venv/bin/python tools/macos/check.py              the check, and a self-test that shows that it can fail
    .venv/bin/python tools/macos/check.py --self-test  only the self-test

The Python that runs it must have the mlx and nanobind of pyproject.toml, as .venv has. All other parts are fetched once into --cache: zig, whose
clang has macOS's C headers and libc++, and MLX's wheels for macOS. CMake then builds the extension with them: with the Metal launcher, with the
kernels for Arm, and with warnings as errors. The symbols of Python, Objective-C and two frameworks come from lists of names, those of MLX from its
own libmlx.dylib, and none may be missing. A stand-in takes the role of the Metal compiler (xcrun.py).

The result is not for use: nothing runs it, it loads a libpython that no Mac has, and it contains zig's libc++. Metal's own compiler does not read
the kernels here.
"""

import argparse
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import macho

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ZIG = "0.17.1"
PLATFORM = "macosx_14_0_arm64"  # the oldest that MLX has wheels for
RPATH = "@loader_path/../mlx/lib"

# The symbols of /usr/lib/libobjc.A.dylib that metal-cpp calls.
OBJC = ["objc_msgSend", "objc_getClass", "objc_lookUpClass", "objc_getProtocol", "objc_retain", "objc_release", "sel_registerName"]

# Symbols of the frameworks that the launcher calls.
FRAMEWORKS = {
    "IOKit": ["kIOMainPortDefault", "IOServiceMatching", "IOServiceGetMatchingService", "IORegistryEntryCreateCFProperty", "IOObjectRelease"],
    "CoreFoundation": [
        *("kCFAllocatorDefault", "__CFConstantStringClassReference"),
        *("CFRelease", "CFGetTypeID", "CFNumberGetTypeID", "CFNumberGetValue"),
    ],
}

# Symbols that the launcher needs: they show that it was compiled with Metal.
METAL = ["metal6device", "metal19get_command_encoder", "CommandEncoder16dispatch_threads"]

PRELUDE = '#include "mlx/backend/metal/device.h"\n#include "mlx/backend/metal/metal.h"\n#include "mlx/ops.h"\nnamespace mx = mlx::core;\n'
FITS = PRELUDE + "bool f(mx::array& x) { x = mx::contiguous(x); return mx::metal::is_available(); }\n"
# Declared in device.h, and hidden in libmlx.
UNEXPORTED = PRELUDE + "bool f(mx::array& x) { x = mx::contiguous(x); return mx::metal::is_nax_available(); }\n"
# The encoder takes an array before its index.
WRONG_CALL = PRELUDE + "void f(mx::Stream s, mx::array& x) { mx::metal::get_command_encoder(s).set_output_array(0, x); }\n"


class CheckError(Exception):
    """The check failed or could not run; the text says which, and why."""


@dataclass(frozen=True)
class Kit:
    """The parts of a build for macOS: folders in the cache."""

    mlx: Path  # the unpacked wheels: mlx/include, mlx/lib/libmlx.dylib, mlx/core.*.so
    toolchain: Path  # cxx, ar, ranlib, xcrun, toolchain.cmake, include, lib
    environment: dict[str, str]


def run(what: str, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
    """Run `command` and return its output. If it fails, raise CheckError, which calls it `what`."""
    done = subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CheckError(f"{what} failed ({done.returncode}): {' '.join(map(str, command))}\n{done.stdout[-8000:]}")
    return done.stdout


def pinned_mlx() -> str:
    """Return the version of MLX that pyproject.toml builds against."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    versions = {match[1] for text in requirements if (match := re.match(r"mlx(?:\[\w+\])?==([\w.]+)", text))}
    if len(versions) != 1:
        raise CheckError(f"pyproject.toml must pin one version of mlx to build with, not {sorted(versions) or 'none'}")
    return versions.pop()


def write(path: Path, text: str, executable: bool = False) -> bool:
    """Write `text` unless the file already holds it, so that files built from it stay up to date. Return whether it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    differs = not path.exists() or path.read_text() != text
    if differs:
        path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return differs


def fetch_zig(cache: Path) -> Path:
    """Return the path of zig, after installing it into the cache if necessary."""
    folder = cache / f"zig-{ZIG}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", partial, f"ziglang=={ZIG}"]
        run("Fetching zig", pip)
        partial.rename(folder)
    return folder / "ziglang" / "zig"


def fetch_mlx(cache: Path, version: str) -> Path:
    """Return the folder of the unpacked wheels of MLX for macOS, without MLX's own Metal kernels. Fetch them if necessary."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"mlx-{version}-{python}"
    if not folder.exists():
        wheels, partial = cache / "wheels", folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(wheels, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        pip += ["--platform", PLATFORM, "--python-version", python, "--dest", str(wheels), f"mlx=={version}", f"mlx-metal=={version}"]
        run("Fetching MLX for macOS", pip)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial, [name for name in archive.namelist() if not name.endswith(".metallib")])
        shutil.rmtree(wheels)
        partial.rename(folder)
    return folder / "mlx"


def library_of_names(name: str, symbols: Iterable[str]) -> str:
    """Return a text-based stub (.tbd), which the linker reads as the library `name` with these symbols."""
    quoted = ", ".join(f"'{symbol}'" for symbol in symbols)
    targets = "targets: [ arm64-macos ]"
    return (
        f"--- !tapi-tbd\ntbd-version: 4\n{targets}\ninstall-name: '{name}'\ncurrent-version: 1\n"
        f"exports:\n  - {targets}\n    symbols: [ {quoted} ]\n...\n"
    )


def nanobind_folder() -> Path:
    """Return nanobind's CMake folder."""
    return Path(run("Asking nanobind where it is", [sys.executable, "-m", "nanobind", "--cmake_dir"]).strip())


def prepare(cache: Path, version: str) -> Kit:
    """Fetch and write the parts of the kit that are not in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    zig, mlx, toolchain = fetch_zig(cache), fetch_mlx(cache, version), cache / "toolchain"
    write(toolchain / "cxx", f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "cxx.py"}" "{zig}" "{toolchain}" "$@"\n', executable=True)
    write(toolchain / "xcrun", f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "xcrun.py"}" "$@"\n', executable=True)
    # CMake calls it to learn the version of macOS.
    write(toolchain / "sw_vers", "#!/bin/sh\necho 14.0\n", executable=True)
    for tool in ("ar", "ranlib"):
        write(toolchain / tool, f'#!/bin/sh\nexec "{zig}" {tool} "$@"\n', executable=True)
    if write(toolchain / "toolchain.cmake", (HERE / "toolchain.cmake").read_text()):
        # CMake reads most of it only in the first configuration.
        shutil.rmtree(cache / "build", ignore_errors=True)
    for header in sorted((HERE / "stubs").rglob("*.h")):
        write(toolchain / "include" / header.relative_to(HERE / "stubs"), header.read_text())
    python = [line.split()[1] for line in (nanobind_folder() / "darwin-ld-cpython.sym").read_text().splitlines() if line.startswith("-U ")]
    write(toolchain / "lib" / "libpython.tbd", library_of_names("@rpath/libpython.dylib", python))
    write(toolchain / "lib" / "libobjc.tbd", library_of_names("/usr/lib/libobjc.A.dylib", [f"_{name}" for name in OBJC]))
    for framework, names in FRAMEWORKS.items():
        installed = f"/System/Library/Frameworks/{framework}.framework/Versions/A/{framework}"
        write(toolchain / "lib" / f"lib{framework}.tbd", library_of_names(installed, [f"_{name}" for name in names]))
    path = os.pathsep.join([str(toolchain), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "ZIG_GLOBAL_CACHE_DIR": str(cache / "zig-cache"), "ZIG_LOCAL_CACHE_DIR": str(cache / "zig-cache")}
    # Flags for this machine's compiler do not apply to the cross compiler.
    for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_GENERATOR", "CMAKE_TOOLCHAIN_FILE", "MACOSX_DEPLOYMENT_TARGET"):
        environment.pop(name, None)
    return Kit(mlx, toolchain, environment)


def build(kit: Kit, folder: Path) -> tuple[Path, list[str]]:
    """Configure and build as scikit-build-core would on a Mac. Return the extension, and its sources in csrc."""
    cmake = shutil.which("cmake", path=kit.environment["PATH"])
    if cmake is None:
        raise CheckError("There is no cmake on the path. Install it, or `pip install cmake` beside mlx and nanobind.")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=kit.environment["PATH"]) else ["-G", "Unix Makefiles"]
    options = {
        "CMAKE_TOOLCHAIN_FILE": kit.toolchain / "toolchain.cmake",
        "CMAKE_BUILD_TYPE": "Release",
        "METALENS_WERROR": "ON",
        "MLX_ROOT": kit.mlx,
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    run("Configuring for macOS", [cmake, "-S", ROOT, "-B", folder, *generator, *defines], kit.environment)
    # The name of the result does not tell from which run it is.
    for old in folder.glob("_ext.*"):
        old.unlink()
    cores = len(os.sched_getaffinity(0))
    run("Compiling and linking for macOS", [cmake, "--build", folder, "--parallel", str(cores)], kit.environment)
    commands = json.loads((folder / "compile_commands.json").read_text())
    sources = sorted(str(Path(command["file"]).relative_to(ROOT)) for command in commands if Path(command["file"]).is_relative_to(ROOT / "csrc"))
    built = [path for pattern in ("_ext.*so", "_ext.*dylib") for path in folder.glob(pattern)]
    if len(built) != 1:
        raise CheckError(f"The build succeeded, and left {[path.name for path in built] or 'no extension'} in {folder}.")
    return built[0], sources


def bindings_tag(path: Path) -> set[str]:
    """Return the tags by which nanobind recognizes modules that may share types, as compiled into the module at `path`."""
    return {tag.decode() for tag in re.findall(rb"(?:v\d+|nanobind)_system_\w+", path.read_bytes())}


def inspect(extension: Path, sources: Sequence[str], mlx: Path) -> list[str]:
    """Check that the extension is what a Mac would load, and return the symbols that it takes from libmlx."""
    image, library = macho.read(extension), macho.read(mlx / "lib" / "libmlx.dylib")
    wanted = image.imported_from("libmlx.dylib")
    core = next(mlx.glob("core.*.so"))
    folder = extension.parent
    demands = {
        "it is not for arm64": image.arm64,
        f"it is for macOS {image.minimum_macos} and up, not 14.0": image.minimum_macos == "14.0",
        f"its rpath is {image.rpaths}, not {RPATH}": image.rpaths == [RPATH],
        f"it loads no libmlx by that rpath, but {image.libraries}": "@rpath/libmlx.dylib" in image.libraries,
        "it does not export PyInit__ext": "_PyInit__ext" in image.exports,
        f"libmlx does not have {sorted(set(wanted) - library.exports)}": set(wanted) <= library.exports,
        f"symbols are bound to no library: {[name for name, source in image.imports.items() if not source]}": all(image.imports.values()),
        "it was compiled without the Metal launcher": "csrc/metal/launcher.cpp" in sources,
        f"it does not take {METAL} from libmlx": all(any(part in name for name in wanted) for part in METAL),
        "it does not ask IOKit for the GPU's cores": "_IOServiceGetMatchingService" in image.imported_from("IOKit"),
        "it was compiled without the kernels for Arm": {"csrc/cpu/isa/neon.cpp", "csrc/cpu/isa/neonbf16.cpp"} <= set(sources),
        f"its nanobind, {bindings_tag(extension)}, is not the one in mlx, {bindings_tag(core)}": bindings_tag(extension)
        == bindings_tag(core)
        != set(),
        "no metalens.metallib was written beside it": (folder / "metalens.metallib").exists(),
    }
    if failed := [text for text, met in demands.items() if not met]:
        raise CheckError(f"{extension} is wrong: {'; '.join(failed)}.")
    return wanted


def attempt(kit: Kit, folder: Path, name: str, source: str) -> str:
    """Compile and link one source like the extension. Return "" if that passes, else the step and the tools' output."""
    file, linked = folder / f"{name}.cpp", folder / f"{name}.so"
    write(file, source)
    includes = [f"-isystem{kit.mlx / 'include' / part}" for part in ("metal_cpp", "")]
    cxx = kit.toolchain / "cxx"
    compiling = [cxx, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-D_METAL_", *includes, "-c", file, "-o", file.with_suffix(".o")]
    linking = [cxx, "-bundle", file.with_suffix(".o"), kit.mlx / "lib" / "libmlx.dylib", "-o", linked]
    for step, command in (("compiling", compiling), ("linking", linking)):
        try:
            run(step, command, kit.environment)
        except CheckError as error:
            return str(error)
    return ""


def self_test(kit: Kit, folder: Path) -> None:
    """Show that the check can fail: of three sources one passes, one fails to link and one fails to compile, each for the right reason."""
    sources = {"fits": FITS, "unexported": UNEXPORTED, "wrong_call": WRONG_CALL}
    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(sources, pool.map(lambda item: attempt(kit, folder, *item), sources.items()), strict=True))
    if said["fits"]:
        raise CheckError(f"A source without a fault was refused:\n{said['fits']}")
    for name, step, word in (("unexported", "linking", "is_nax_available"), ("wrong_call", "compiling", "set_output_array")):
        # The first line is the command.
        if not said[name].startswith(step) or word not in said[name].partition("\n")[2]:
            raise CheckError(f"{name}.cpp must fail in {step} and for {word}; it " + (f"fails thus:\n{said[name]}" if said[name] else "passes."))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check of the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "macos", help="folder for what is fetched and built (default: build/macos)")
    parser.add_argument("--self-test", action="store_true", help="only prove that a missing symbol and a wrong call are refused")
    options = parser.parse_args(arguments)
    began, cache, parts = time.monotonic(), options.cache.resolve(), []
    try:
        version = pinned_mlx()
        kit = prepare(cache, version)
        if not options.self_test:
            extension, sources = build(kit, cache / "build")
            symbols = inspect(extension, sources, kit.mlx)
            (cache / "libmlx-symbols.txt").write_text("".join(f"{symbol}\n" for symbol in symbols))
            parts.append(
                f"{len(sources)} sources compiled and linked, {len(symbols)} symbols of libmlx used (listed in {cache / 'libmlx-symbols.txt'})"
            )
        self_test(kit, cache / "self-test")
        parts.append("a missing symbol and a wrong call are refused")
    except (CheckError, OSError, ValueError) as error:
        sys.stderr.write(f"macOS check FAILED: {error}\n")
        return 1
    sys.stdout.write(f"macOS check, arm64, mlx {version}, zig {ZIG}: {'; '.join(parts)}. {time.monotonic() - began:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
