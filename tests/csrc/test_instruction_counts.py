"""Compare the instruction counts of small cases of the kernels with committed counts: a guard of speed that needs no idle machine.

After a change that is meant to alter the counts:

    METALENS_REFRESH_COUNTS=1 python -m pytest tests/csrc/test_instruction_counts.py

rewrites instruction_counts.json.
"""

import json
import os
import platform
import re
import shutil
import subprocess

import pytest

from csrc import build
from metalens import _ext

COUNTS = build.HERE / "instruction_counts.json"
CASES = ["gemm", "matvec_rows", "lens_stats", "lens_kl"]
ALLOWED = 1.10
REFRESH = os.environ.get("METALENS_REFRESH_COUNTS") == "1"
VALGRIND = shutil.which("valgrind")

pytestmark = [
    pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler on the path"),
    pytest.mark.skipif(VALGRIND is None, reason="no valgrind on the path"),
    pytest.mark.skipif("avx2" not in _ext.available_isas().split(), reason="the counts are for AVX2 code, which this CPU cannot run"),
]


def compiler_version():
    """Return a text such as "g++ 12.2.0", without the distribution's additions."""
    line = subprocess.run([build.COMPILER, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return re.sub(r" \(.*?\)", "", line)


@pytest.fixture(scope="module")
def committed():
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if not REFRESH and known.get("compiler") != compiler_version():
        pytest.skip(f"the committed counts are for {known.get('compiler')}; this is {compiler_version()}, which generates other code")
    yield known.get("counts", {})
    if REFRESH:
        COUNTS.write_text(json.dumps({"compiler": compiler_version(), "counts": REFRESHED}, indent=2) + "\n")


REFRESHED = {}


@pytest.fixture(scope="module")
def program(committed, tmp_path_factory):
    flags = build.release_flags()
    return build.build(tmp_path_factory.mktemp("cost"), ["kernels_cost"], machine=platform.machine(), flags=flags, isas=["avx2"])["kernels_cost"]


@pytest.mark.parametrize("case", CASES)
def test_kernels_take_no_more_instructions_than_before(committed, program, case, tmp_path):
    environment = {**os.environ, "METALENS_ISA": "avx2", "METALENS_NUM_THREADS": "1"}
    command = [VALGRIND, "--tool=callgrind", "--toggle-collect=measured", f"--callgrind-out-file={tmp_path / 'out'}", program, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    count = int(re.search(r"Collected : (\d+)", done.stderr)[1])
    assert count > 0
    if REFRESH:
        REFRESHED[case] = count
        return
    before = committed[case]
    assert count <= ALLOWED * before, (
        f"{case} takes {count} instructions, {count / before - 1:+.1%} against the committed {before}. If that is intended, run "
        f"METALENS_REFRESH_COUNTS=1 python -m pytest {COUNTS.parent.relative_to(build.ROOT)}/test_instruction_counts.py and commit {COUNTS.name}."
    )
