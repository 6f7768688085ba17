"""The CPU kernels under the compiler's sanitizers: wrong accesses, undefined behaviour, races. Built from source without MLX."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from metalens import _ext

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]}

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the path"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers' flags here are those of Linux compilers"),
]


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    sources = [
        ROOT / "tests/csrc/gemm_check.cpp",
        *(ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("dispatch", "gemm", "thread_pool", "gemm_portable")),
    ]
    if platform.machine() in ("x86_64", "AMD64"):
        sources += [ROOT / f"csrc/cpu/gemm_{isa}.cpp" for isa in FLAGS]
    common = [COMPILER, "-std=c++20", "-O1", "-g", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    objects = []
    for source in sources:
        isa = source.stem.removeprefix("gemm_")
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*common, *FLAGS.get(isa, []), "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([*common, *objects, "-pthread", "-o", folder / "check"], check=True)
    return folder / "check"


@pytest.mark.parametrize("isa", _ext.available_isas().split())
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_right_and_stay_within_their_buffers(program, isa, threads):
    environment = {**os.environ, "METALENS_ISA": isa, "METALENS_NUM_THREADS": str(threads)}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
