import os
import signal
import subprocess
import sys
import threading

import pytest

from metalens.utils.errors import MetalensError
from metalens.utils.lock import LockedError, locked
from support.full_disk import largest_file


def test_the_second_run_learns_who_the_first_is(tmp_path):
    said = rf"Another run \(pid {os.getpid()} on .+\) writes to here. Wait for it"
    with locked(tmp_path / "lock", "here"), pytest.raises(LockedError, match=said), locked(tmp_path / "lock", "here"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "lock", "here"):
        pass
    assert issubclass(LockedError, MetalensError)
    assert issubclass(LockedError, OSError)


def test_a_killed_process_holds_no_lock(tmp_path):
    script = f"""
import os, pathlib, signal
from metalens.utils.lock import locked
with locked(pathlib.Path({str(tmp_path / "lock")!r}), "here"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["lock"]
    with locked(tmp_path / "lock", "here"):
        pass
    assert os.listdir(tmp_path) == []


def test_an_error_releases_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock", "here"):
        raise KeyboardInterrupt
    with locked(tmp_path / "lock", "here"):
        pass


def test_one_at_a_time(tmp_path):
    """Many threads try again and again: no two are ever inside, although each deletes the file at its end."""
    inside, entered, overlaps = [0], [0], []

    def work():
        for _ in range(200):
            try:
                with locked(tmp_path / "lock", "here"):
                    inside[0] += 1
                    entered[0] += 1
                    overlaps.append(inside[0] > 1)
                    inside[0] -= 1
            except LockedError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered[0] > 0
    assert not any(overlaps)


def test_where_there_are_no_locks_everyone_goes_on(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", fail)
    with locked(tmp_path / "lock", "here"), locked(tmp_path / "lock", "here"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_full_disk_does_not_open_the_lock(tmp_path):
    """What is written next says that the disk is full, and names its file. The lock file stayed behind."""
    with largest_file(0), locked(tmp_path / "lock", "here"):
        assert (tmp_path / "lock").read_bytes() == b""
        with pytest.raises(LockedError, match="Another run .unknown."), locked(tmp_path / "lock", "here"):
            pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []
