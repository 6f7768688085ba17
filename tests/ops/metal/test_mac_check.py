"""The script behind `make mac-check`, in emulation."""

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
    assert [line for line in report.splitlines() if line.startswith("## ")] == ["## Facts", "## Compile", "## Compare", "## Measure"]
    assert "17 of 17 cells good" in report
    assert "lens_kl" in report


@pytest.mark.skipif(sys.platform == "darwin", reason="here it would run")
def test_it_says_what_it_needs(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "report.md"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "needs a Mac with Apple silicon" in done.stderr
    assert not (tmp_path / "report.md").exists()
