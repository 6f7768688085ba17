"""Test products of 16-bit operands under the compiler's sanitizers: wrong values, wrong accesses, undefined behavior. Built from source without MLX.

The products run on definitions of the instructions in plain C++, compiled for AVX2, and on the instructions themselves if the CPU has them.
"""

import platform
import subprocess

import pytest

from csrc import build
from metalens import _ext

SOFTWARE = ["-DMETALENS_SOFTWARE_TILES", "-DMETALENS_SOFTWARE_DOT"]
# The unit of AMX also builds the optional float32 product on tiles; the 16-bit product is the same without it.
OPTIONS = {"amx": ["-DMETALENS_SPLIT_FLOAT32"], "avx512bf16": []}

pytestmark = [
    pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler on the path"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers' flags here are those of Linux compilers"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these units are for x86-64"),
]


@pytest.fixture(params=["software", "instructions"])
def flags_of(request):
    """Give a function that returns the flags for a unit, on the definitions in software or on the instructions."""

    def flags(isa):
        needed, available = "avx2" if request.param == "software" else isa, _ext.available_isas().split()
        if needed not in available:
            pytest.skip(f"this CPU lacks {needed}; it has {', '.join(available)}")
        software = SOFTWARE if request.param == "software" else []
        return [*build.units(platform.machine())[needed][1], *software, f"-DMETALENS_CHECKED_ISA={isa}"]

    return flags


# What lens_kl and lens_target need beside the unit.
KERNELS = ("buffer", "block_product", "split_vocab", "lens_kl", "lens_target", "thread_pool")


def run(folder, program, isa, flags, kernels=()):
    sources = [build.HERE / f"{program}.cpp", build.units(platform.machine())[isa][0], *(build.ROOT / f"csrc/cpu/{name}.cpp" for name in kernels)]
    include = [f"-I{build.ROOT / 'csrc'}", f"-I{build.HERE}"]
    subprocess.run([build.COMPILER, "-std=c++20", "-Wno-psabi", *include, *flags, *sources, "-pthread", "-o", folder / "check"], check=True)
    done = subprocess.run([folder / "check"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("isa", OPTIONS)
def test_products_are_right_and_stay_within_their_buffers(isa, flags_of, tmp_path):
    run(tmp_path, "multiplier_check", isa, [*flags_of(isa), *OPTIONS[isa], "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])


@pytest.mark.parametrize("isa", OPTIONS)
def test_a_kl_of_16_bit_operands_is_as_exact_as_promised(isa, flags_of, tmp_path):
    run(tmp_path, "bf16_accuracy_check", isa, [*flags_of(isa), "-O2"], KERNELS)
