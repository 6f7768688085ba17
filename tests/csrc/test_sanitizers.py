"""Test the CPU kernels under the compiler's sanitizers: wrong values, wrong accesses, undefined behavior, races. Built from source without MLX."""

import os
import platform
import subprocess

import pytest

from csrc import build
from metalens import _ext

ISAS = _ext.available_isas().split()
# kernels_check calls the table's functions from one thread, so there are no races to find.
CHECKS_WITH_THREADS = [check for check in build.CHECKS if check != "kernels_check"]

pytestmark = [
    pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler on the path"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers' flags here are those of Linux compilers"),
]


def built(sanitizer, checks, folder):
    flags = ["-O1", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    return build.build(folder, checks, machine=platform.machine(), flags=flags, isas=ISAS)


@pytest.fixture(scope="module")
def checks_of_accesses(tmp_path_factory):
    return built("address,undefined", build.CHECKS, tmp_path_factory.mktemp("accesses"))


@pytest.fixture(scope="module")
def checks_of_races(tmp_path_factory):
    return built("thread", CHECKS_WITH_THREADS, tmp_path_factory.mktemp("races"))


def run(program, isa, threads):
    # Memory that was never written reads as NaN, so that a kernel that uses it is found.
    fill = "max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    environment = {**os.environ, "METALENS_ISA": isa, "METALENS_NUM_THREADS": str(threads), "ASAN_OPTIONS": fill}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]


@pytest.mark.parametrize("check", build.CHECKS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_are_right_and_stay_within_their_buffers(checks_of_accesses, check, isa, threads):
    run(checks_of_accesses[check], isa, threads)


@pytest.mark.parametrize("check", CHECKS_WITH_THREADS)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_race(checks_of_races, check, isa):
    run(checks_of_races[check], isa, threads=3)
