"""Test the search for the compiler, the cache, and parallel builds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

import mslcpu
from mslcpu import build
from mslcpu.support import needs_clang, run
from mslcpu.toolchain import clang, find_clang

TESTS = Path(__file__).parents[1]


def in_child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(TESTS)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_without_a_compiler_there_is_a_reason():
    done = in_child("import mslcpu; print(mslcpu.unavailable())", MSLCPU_CLANG="no-such-clang")
    assert done.stdout.startswith("no clang >= 19 (none of no-such-clang found"), done.stderr
    assert in_child("import mslcpu; print(mslcpu.unavailable())", MSLCPU_CLANG="/bin/true").stdout.startswith("no clang >= 19 (/bin/true is not")


def test_reason_or_compiler():
    path, reason = find_clang()
    assert (path is None) == bool(reason)


@needs_clang
def test_the_runtime_compiles_without_warnings():
    sources = sorted((build.HERE / "runtime").glob("*.cpp"))
    flags = [flag for flag in build.RUNTIME if flag != "-shared"]
    done = subprocess.run([clang(), "-x", "c++", *flags, "-fsyntax-only", *sources], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_clang
def test_libraries_are_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("MSLCPU_CACHE", str(tmp_path))
    for body in ("out[i] = 1;", "out[i] = 1;", "out[i] = 2;"):
        run(body)
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith("runtime")]) == 2
    with mslcpu.options(checked=False):
        run("out[i] = 1;")
    assert sorted(p.suffix for p in tmp_path.iterdir() if not p.name.startswith("runtime")) == [".so"] * 3, "nothing temporary stays"


@needs_clang
def test_processes_build_the_same_kernel_at_once(tmp_path):
    code = "from mslcpu.support import run; print(run('out[i] = x[i] + 1;').tolist()[5])"
    environment = os.environ | {"PYTHONPATH": str(TESTS), "MSLCPU_CACHE": str(tmp_path)}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [child.communicate(timeout=120)[0] for child in children] == ["6.0\n"] * 3


@needs_clang
def test_prebuild(tmp_path, monkeypatch):
    monkeypatch.setenv("MSLCPU_CACHE", str(tmp_path))
    mslcpu.prebuild([lambda n=n: run_only_built(f"out[i] = {n};") for n in range(3)])
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith("runtime")]) == 3
    with pytest.raises(mslcpu.MslError, match="undeclared"):
        mslcpu.prebuild([lambda: run_only_built("out[i] = undeclared;")])


def run_only_built(body: str) -> None:
    kernel = mslcpu.metal_kernel("built", [], ["out"], "uint i = thread_position_in_grid.x; " + body)
    assert kernel(
        inputs=[], output_shapes=[(8,)], output_dtypes=[mx.float32], grid=(8, 1, 1), threadgroup=(8, 1, 1), build_only=True
    ) == []  # fmt: skip


@needs_clang
def test_launches_from_several_threads_take_turns():
    results: dict[int, float] = {}

    def launch(n: int) -> None:
        results[n] = run("out[i] = simd_sum(x[i] + n);", {"x": mx.arange(64, dtype=mx.float32), "n": n}).tolist()[0]

    threads = [threading.Thread(target=launch, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: 496.0 + 32 * n for n in range(4)}


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="schedule 'sideways' is none of forward"), mslcpu.options(schedule="sideways"):
        pass
    with pytest.raises(TypeError), mslcpu.options(chekced=False):
        pass


@needs_clang
def test_faults_of_the_host_stay_the_hosts():
    """The runtime's signal handlers must pass on the signals that are not theirs."""
    done = in_child("from mslcpu.support import run; run('out[i] = 0;'); import ctypes; ctypes.string_at(0)")
    assert done.returncode == -11
