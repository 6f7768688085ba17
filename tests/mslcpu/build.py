"""Build a shared library from Metal source: preprocess, lint, rewrite, compile. All results are cached by content."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence

from .errors import MslError
from .lint import lint, lint_includes
from .rewrite import rewrite
from .tokens import tokenize
from .toolchain import clang, clang_identity

HERE = pathlib.Path(__file__).parent
INCLUDE = HERE / "include"

LANGUAGE = [
    "-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc", "-cl-single-precision-constant",
    # On x86-64 clang has these types without the option.
    "-Xclang", "-cl-ext=+cl_khr_fp16,+__opencl_c_generic_address_space,+__opencl_c_program_scope_global_variables",
    # Every operation on half and bfloat rounds, as on the GPU; by default clang keeps float between operations.
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
]  # fmt: skip
MACROS = ["-D__METAL__", "-D__METAL_VERSION__=400", "-D__HAVE_TENSOR__", "-D__METAL_MACOS__", "-D__HAVE_BFLOAT__"]
WARNINGS = ["-Wno-everything", "-Wimplicit-float-conversion", "-Wuninitialized", "-Werror=uninitialized", "-Werror=return-type"]
MACHINE = {"x86_64": ["-mavx2", "-mfma", "-mf16c"]}.get(platform.machine(), [])
# Endless loops stay, so that the time limit finds them. Stacks are probed page by page, so that none grows past its guard page unnoticed.
CODE = [*MACHINE, "-ffp-contract=off", "-fno-finite-loops", "-fstack-clash-protection", "-fPIC", "-shared"]
FAST = ["-O2", "-gline-tables-only"]
CHECKED = [
    "-DMSL_CHECKED", "-O1", "-gline-tables-only", "-fno-vectorize", "-fno-slp-vectorize", "-fno-optimize-sibling-calls",
    # Every load and store becomes a call of a function that the runtime defines; no shadow memory, no sanitizer library.
    "-fsanitize=kernel-address", "-mllvm", "-asan-instrumentation-with-call-threshold=0", "-mllvm", "-asan-stack=0",
    "-mllvm", "-asan-globals=0", "-mllvm", "-asan-kernel-mem-intrinsic-prefix=1",
    "-fsanitize=alignment,array-bounds,integer-divide-by-zero",
    "-fno-sanitize-recover=alignment,array-bounds,integer-divide-by-zero",
]  # fmt: skip
RUNTIME = ["-std=c++17", "-O3", *MACHINE, "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]

_TO_BFLOAT = re.compile(r"warning: implicit conversion.* to '[^']*(?:' \(aka '[^']*)?__bf16'")


def cache_directory() -> pathlib.Path:
    path = pathlib.Path(os.environ.get("MSLCPU_CACHE") or pathlib.Path.home() / ".cache" / "mslcpu")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _hash_of(paths: Iterable[pathlib.Path]) -> str:
    # The path of this folder is part of the result: the debug information names the prelude's files, and errors omit them by their path.
    digest = hashlib.sha256(f"{clang_identity()}\0{HERE}".encode())
    for path in sorted(p for p in paths if p.is_file()):
        digest.update(str(path.relative_to(HERE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _translator() -> str:
    """Return a text that changes with the compiler and with every file that affects a kernel's translation."""
    scripts = [HERE / f"{name}.py" for name in ("build", "lint", "rewrite", "signature", "structs", "tokens")]
    return _hash_of([*scripts, HERE / "runtime" / "abi.h", *INCLUDE.glob("**/*")])


def _key(identity: str, *parts: object) -> str:
    return hashlib.sha256("\0".join([identity, *map(repr, parts)]).encode()).hexdigest()[:32]


def _run(command: Sequence[str], text: str | None = None) -> tuple[int, str, str]:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def _finish(temporary: str, final: pathlib.Path) -> pathlib.Path:
    os.replace(temporary, final)  # atomic: processes that build the same library do not disturb one another
    return final


@functools.cache
def runtime_library() -> pathlib.Path:
    """Compile the runtime once."""
    final = cache_directory() / f"runtime-{_key(_hash_of((HERE / 'runtime').iterdir()), RUNTIME)}.so"
    if final.exists():
        return final
    with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
        library = os.path.join(directory, "runtime.so")
        sources = [str(p) for p in sorted((HERE / "runtime").glob("*.cpp"))]
        status, _, errors = _run([clang(), "-x", "c++", *RUNTIME, *sources, "-lstdc++", "-o", library])
        if status:
            raise MslError(f"mslcpu's runtime did not compile:\n{errors}")
        return _finish(library, final)


def preprocess(source: str, name: str, include_dirs: Sequence[str | os.PathLike[str]] = ()) -> str:
    lint_includes(source, name)
    directories = [f"-I{INCLUDE}", *(f"-I{os.fspath(d)}" for d in include_dirs)]
    marked = f'#line 1 "{name}"\n{source}'
    status, text, errors = _run([clang(), *LANGUAGE, *MACROS, *directories, "-E", "-"], marked)
    if status:
        raise MslError(errors.strip())
    return text


def _diagnostics(errors: str) -> list[str]:
    """Split the compiler's output into messages, each with the lines that belong to it."""
    return [d for d in re.split(r"^(?=\S+:\d+:\d+: |In file included from )", errors, flags=re.MULTILINE) if d.strip()]


def _rejections(status: int, errors: str) -> str | None:
    """Return the compiler's errors and, as errors, its warnings of implicit conversions to bfloat, which Metal rejects. None without any."""
    kept = []
    wanted = False
    for diagnostic in _diagnostics(errors):
        head = diagnostic.split("\n", 1)[0]
        if " warning: " in head:
            wanted = _TO_BFLOAT.search(head) is not None
        elif " note: " not in head:
            wanted = True
        if wanted and not (" note: " in head and str(INCLUDE) in head):
            kept.append(diagnostic.replace("warning:", "error: Metal has no implicit conversion to bfloat:", 1))
    if status == 0 and not any(" error: " in d for d in kept):
        return None
    return "".join(kept).strip()[:6000]


def translate(preprocessed: str, with_mlx: bool = False) -> str:
    """Lint the source and return the complete text to compile.

    `with_mlx`: the source begins with MLX's own preamble, whose definitions the prelude leaves out.
    """
    lint(tokenize(preprocessed))
    defined = "#define MSL_MLX_PREAMBLE\n" if with_mlx else ""
    return f'{defined}#include "{INCLUDE}/msl/prelude.h"\n{rewrite(preprocessed)}\n'


def check_syntax(translated: str) -> None:
    status, _, errors = _run([clang(), *LANGUAGE, *MACHINE, *WARNINGS, "-fsyntax-only", "-ferror-limit=20", "-"], translated)
    if message := _rejections(status, errors):
        raise MslError(message)


def build_kernel(source: str, call: str, arguments: str, checked: bool) -> pathlib.Path:
    """Return the library of a kernel, given its complete source; `call` is its name with template arguments."""
    options = [*LANGUAGE, *CODE, *WARNINGS, *(CHECKED if checked else FAST)]
    final = cache_directory() / f"{_key(_translator(), source, call, arguments, options)}.so"
    if final.exists():
        return final
    text = translate(preprocess(source, "source"))
    text += (
        '#line 1 "entry"\n'
        'extern "C" __attribute__((no_sanitize("address", "alignment", "array-bounds")))\n'
        f"void msl_entry(const __generic MslContext* c) {{ {call}({arguments}); }}\n"
    )
    with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
        path, library = os.path.join(directory, "kernel.cl"), os.path.join(directory, "kernel.so")
        pathlib.Path(path).write_text(text)
        status, _, errors = _run([clang(), *options, "-ferror-limit=10", path, "-lm", "-o", library])
        if message := _rejections(status, errors):
            raise MslError(message)
        return _finish(library, final)
