"""Test the values of the kernels for 64-bit Arm, cross-compiled and run under an emulator. Uses Linux's tools, which CI installs."""

import os
import shutil
import subprocess

import pytest

from csrc import build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++ on the path (package g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64 on the path (package qemu-user)"),
]


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    # Optimized like a release: no other test sees the compiler's vector code for that machine.
    flags = [*build.release_flags(), "-static"]
    isas = list(build.units("aarch64"))
    return build.build(tmp_path_factory.mktemp("neon"), build.CHECKS, machine="aarch64", flags=flags, isas=isas, compiler=COMPILER)


@pytest.mark.parametrize("check", build.CHECKS)
@pytest.mark.parametrize("isa", build.units("aarch64"))
def test_kernels_are_right_on_arm(checks, check, isa):
    environment = {**os.environ, "METALENS_ISA": isa, "METALENS_NUM_THREADS": "2"}
    done = subprocess.run([EMULATOR, "-cpu", "max", checks[check]], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]


def test_a_kl_of_16_bit_operands_is_as_exact_as_promised(tmp_path):
    source, options = build.units("aarch64")["neonbf16"]
    sources = [build.HERE / "bf16_accuracy_check.cpp", source]
    sources += [build.ROOT / f"csrc/cpu/{name}.cpp" for name in ("buffer", "block_product", "split_vocab", "lens_kl", "lens_target", "thread_pool")]
    flags = [*build.release_flags(), *options, "-static", "-DMETALENS_CHECKED_ISA=neonbf16", f"-I{build.ROOT / 'csrc'}", f"-I{build.HERE}"]
    subprocess.run([COMPILER, "-std=c++20", "-Wno-psabi", *flags, *sources, "-o", tmp_path / "check"], check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", tmp_path / "check"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]
