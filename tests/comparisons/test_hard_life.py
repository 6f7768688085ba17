"""tools/hard_life: what it takes for a change of a file, for damage, and for an error that names the file. The trials themselves take minutes."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import numpy as np
from hard_life.bits import ANEW, NOTICED, SILENT, _flips
from hard_life.jobs import JOBS, Job, contents, leftovers
from hard_life.page import page
from hard_life.process import Process, at_every_change
from hard_life.trials import Bench, Found, names_file

from metalens.utils.errors import InvalidValueError

JOB = Job("write", lambda version: [], {"a": "a.txt", "metrics.jsonl": "m.jsonl"})


def test_a_process_is_killed_before_the_change_that_is_asked_for(tmp_path):
    """Python's own audit events: opening for writing, moving, deleting; fsync too. Reading is no change."""
    (tmp_path / "work").mkdir()

    def write():
        moments = iter(range(3))
        at_every_change(tmp_path / "work", lambda: next(moments, None) == 2 and os.kill(os.getpid(), signal.SIGKILL))
        Path("a.txt").write_text("a")
        Path("a.txt").read_text()
        Path("a.txt").rename("b.txt")
        Path(tmp_path / "elsewhere").write_text("not in the folder")
        Path("b.txt").unlink()

    ended = Process(write, tmp_path / "work", tmp_path / "log", {}).end()
    assert ended.code == -signal.SIGKILL
    assert ended.crashed
    assert os.listdir(tmp_path / "work") == ["b.txt"]
    assert (tmp_path / "elsewhere").exists()


def bench_of(folder, old, new):
    bench = Bench.__new__(Bench)
    bench.work = folder
    bench.expected = {
        JOB.name: [{"a": {"a.txt": old}, "metrics.jsonl": {}}, {"a": {"a.txt": new}, "metrics.jsonl": {"m.jsonl": b'{"step": 0}\n{"step": 1}'}}]
    }
    return bench


@pytest.mark.parametrize(("found", "state", "wrong"), [(b"old", "old", 0), (b"new", "new", 0), (b"half", "other", 1)])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, found, state, wrong):
    (tmp_path / "a.txt").write_bytes(found)
    (tmp_path / ".a.txt.metalens-x.txt").write_text("half")
    (tmp_path / "m.jsonl").write_text('{"step": 0, "tokens_per_second": 7.0}\n{"step"')
    seen = Found()
    bench_of(tmp_path, b"old", b"new").states(JOB, seen, "here")
    assert seen.states == {"a": Counter({state: 1}), "metrics.jsonl": Counter({"a part": 1})}
    assert len(seen.wrong) == wrong
    assert leftovers(tmp_path) == [".a.txt.metalens-x.txt"]
    assert list(contents(tmp_path, JOB)["a"]) == ["a.txt"]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("Error: [Errno 28] No space left on device: '/folder/a.txt'\n", True),
        ("Warning: slow\nError: Could not write m.jsonl: [Errno 28] No space left on device. Make room.\n", True),
        ("Error: [Errno 28] No space left on device\n", False),
        ("Traceback (most recent call last):\nOSError: No space left on device: 'a.txt'\n", False),
    ],
)
def test_an_error_that_names_the_file(said, named):
    assert names_file(said, JOB) == named


def test_flipped_bits_are_sorted_by_what_reading_says(tmp_path):
    """Bytes 0 and 1 are checked, in byte 2 a bit makes the file look missing, and byte 3 is taken as it is."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\0d")

    def read():
        data = path.read_bytes()
        if data[:2] != b"ab":
            raise InvalidValueError("damaged")
        return None if data[2] else data

    assert _flips(tmp_path, "a.txt", read, 1000, np.random.default_rng(0)) == {NOTICED: 16, ANEW: 8, SILENT: 8}
    assert path.read_bytes() == b"ab\0d"


def test_the_page_says_what_was_found():
    killed = Found(3, {"page.html": Counter(old=2, new=1)})
    assert Found.from_dict(json.loads(json.dumps(killed.to_dict()))) == killed
    text = page({"view": {"killed": killed}})
    assert "| `view` | `page.html` | old 2, new 1 |  |  |  |" in text
    assert "What must not be" not in text
    assert "What must not be\n\n- view: a surprise" in page({"view": {"killed": Found(1, wrong=["view: a\nsurprise"])}})
    assert len({job.name for job in JOBS}) == len(JOBS)
