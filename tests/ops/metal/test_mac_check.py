"""The script behind `make mac-check`, in emulation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.metal_emulation import needs_clang

SCRIPT = Path(__file__).parents[3] / "tools" / "mac_check.py"


@needs_clang
def test_it_goes_through_all_steps(tmp_path):
    out = tmp_path / "report.md"
    done = subprocess.run([sys.executable, SCRIPT, "--emulated", "--out", out], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = out.read_text()
    assert "nothing was measured on Apple hardware" in report
    parts = [line[3:] for line in report.splitlines() if line.startswith("## ")]
    assert parts == ["Facts", "Compile", "Compare", "Measure", "Tiles of tensor operations"]
    assert "19 of 19 cells good" in report
    assert "lens_kl" in report
    assert "lens_compare" in report
    of_tensors = report[report.index("## Tiles of tensor operations") :]
    assert "6 of 6 cells good" in of_tensors
    assert re.search(r"\| tiny \| lens_stats \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", of_tensors)
    assert re.search(r"^(Enable|Do not enable) tensor tiles on this chip", of_tensors, flags=re.MULTILINE)


@pytest.mark.skipif(sys.platform == "darwin", reason="here it would run")
def test_it_says_what_it_needs(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "report.md"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "needs a Mac with Apple silicon" in done.stderr
    assert not (tmp_path / "report.md").exists()


FAKE = """#!/bin/sh
# A compiler that knows two versions of Metal, warns in one of them and rejects one file.
echo "$*" >> "{log}"
case "$*" in
  *--version*) exit 0 ;;
  *metal3.1*) text=$(cat); case "$text" in *metalens_norm_grad*) echo "error: norm_grad" >&2; exit 1 ;; esac ;;
  *metal4.0*) echo "warning: a warning" >&2; cat > /dev/null ;;
  *) exit 1 ;;
esac
"""


def test_every_version_of_metal_that_the_compiler_knows_is_compiled(tmp_path):
    log, xcrun = tmp_path / "log", tmp_path / "xcrun"
    xcrun.write_text(FAKE.format(log=log))
    xcrun.chmod(0o755)
    script = (
        "import sys, runpy; check = runpy.run_path(sys.argv[1]); g = check['compile_all'].__globals__\n"
        "units = g['library'].translation_units(); g['library'].translation_units = lambda: dict(list(units.items())[:2])\n"
        "g['library'].tensor_units = lambda one=list(g['library'].tensor_units().items())[:1]: dict(one)\n"
        "lines, failures = check['compile_all'](); print('\\n'.join(lines)); print(failures, g['os'].environ['MLX_ENABLE_TF32'])"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", script, SCRIPT], capture_output=True, text=True, timeout=100, check=True, env=environment)
    lines = done.stdout.splitlines()
    assert lines[-1] == "1 0"  # one failure; no TF32
    assert "metal3.2: this compiler does not know it" in lines
    assert "metal4.1: this compiler does not know it" in lines
    assert any(line.startswith("metal3.1: 1 of 2 files compile") for line in lines)
    assert any(line.startswith("metal4.0: 3 of 3 files compile") for line in lines)
    assert "    error: norm_grad" in lines
    assert sum("warning: a warning" in line for line in lines) == 3
    assert all("-Wmetal-addr-spaces" in line and "-fno-fast-math" in line for line in log.read_text().splitlines() if "--version" not in line)
