import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from metalens.utils import files
from metalens.utils.files import atomic_write, remove_left_behind, require_writable, temporary_folder


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old, and longer")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old, and longer"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_move_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.mkdir()
    with pytest.raises(OSError, match=r"a\.txt"), atomic_write(path) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a.txt"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "missing" / "a.txt"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_writable_path_leaves_no_trace(tmp_path):
    old = tmp_path / "old.npz"
    old.write_text("kept")
    require_writable(old)
    require_writable(tmp_path / "new.npz")
    assert names(tmp_path) == ["old.npz"]
    assert old.read_text() == "kept"


def test_missing_parents_are_created(tmp_path):
    require_writable(tmp_path / "a" / "b" / "lens.npz")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == []


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"Can't write .*lens\.npz.*Choose a path"):
        require_writable(tmp_path / "file" / "lens.npz")


def test_a_folder_cannot_be_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory"):
        require_writable(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="Can't write"):
            require_writable(folder / "lens.npz")
    finally:
        folder.chmod(0o700)


def test_a_full_disk_names_the_file(tmp_path):
    def fail():
        with atomic_write(tmp_path / "a.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'") as caught:
        fail()
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), atomic_write(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_text()


def test_the_folder_is_forced_to_the_disk_after_the_move(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append((folder, names(folder))))
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert synced == [(tmp_path, ["a.txt"])]


def test_temporaries_of_killed_processes_are_removed(tmp_path):
    # Killed between making the temporary file and the move: the kernel drops the lock, the file stays.
    script = f"""
import os, pathlib, signal
from metalens.utils import files
from metalens.utils.files import atomic_write
with atomic_write(pathlib.Path({str(tmp_path / "a.npz")!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    (left,) = names(tmp_path)
    assert left.startswith(".a.npz.metalens-")
    (tmp_path / ".a.npz.of-a-user.npz").write_text("kept")

    def write():
        with atomic_write(tmp_path / "a.npz") as temporary:
            temporary.write_text("whole")

    write()
    assert left in names(tmp_path)  # too young: its writer may not have locked it yet
    os.utime(tmp_path / left, (0, 0))
    write()
    assert names(tmp_path) == [".a.npz.of-a-user.npz", "a.npz"]


@pytest.mark.parametrize("by", ["write", "check"])
def test_what_a_check_left_that_was_killed_is_removed(tmp_path, monkeypatch, by):
    """Also by a check alone: some files are checked with it, and then not written with `atomic_write`."""

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", killed)
    with pytest.raises(KeyboardInterrupt):
        require_writable(tmp_path / "a.npz")
    monkeypatch.undo()
    (left,) = names(tmp_path)
    os.utime(tmp_path / left, (0, 0))
    if by == "write":
        with atomic_write(tmp_path / "a.npz") as temporary:
            temporary.write_text("whole")
    else:
        require_writable(tmp_path / "a.npz")
    assert names(tmp_path) == (["a.npz"] if by == "write" else [])


def test_the_temporary_of_a_living_process_stays(tmp_path):
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("mine")
        os.utime(temporary, (0, 0))
        with atomic_write(tmp_path / "a") as other:
            other.write_text("theirs")
        assert temporary.exists()
    assert (tmp_path / "a").read_text() == "mine"


def test_a_device_is_not_replaced_by_a_file():
    with pytest.raises(OSError, match="device or a pipe"):
        require_writable(Path("/dev/null"))


def test_a_temporary_folder_goes_away_unless_it_was_moved(tmp_path):
    with temporary_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("w")
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == []
    with temporary_folder(tmp_path / "model") as folder:
        folder.replace(tmp_path / "model")
    assert names(tmp_path) == ["model"]
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path / "model") as folder:
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"]
    with pytest.raises(OSError, match=r"'.*/missing/model'"), temporary_folder(tmp_path / "missing" / "model"):
        pytest.fail("the block must not run")


def test_folders_of_killed_processes_are_removed(tmp_path):
    script = f"""
import os, pathlib, signal
from metalens.utils.files import temporary_folder
with temporary_folder(pathlib.Path({str(tmp_path / "model-1.5")!r})) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    (left,) = names(tmp_path)
    (tmp_path / ".model-1.5.of-a-user").mkdir()
    remove_left_behind(tmp_path / "model-1.5")
    assert left in names(tmp_path)  # too young
    os.utime(tmp_path / left, (0, 0))
    with temporary_folder(tmp_path / "model-1.5") as folder:
        assert names(tmp_path) == sorted([".model-1.5.of-a-user", folder.name])
        os.utime(folder, (0, 0))
        remove_left_behind(tmp_path / "model-1.5")
        assert folder.exists()  # old, and in use
    assert names(tmp_path) == [".model-1.5.of-a-user"]


def test_naming_keeps_the_name_of_another_file(tmp_path):
    """As of an input that is gone while an output is written."""
    target, source = tmp_path / "model", tmp_path / "model.gguf"
    for block in (files.naming(target), atomic_write(target)):
        with pytest.raises(FileNotFoundError) as caught, block:
            source.open()
        assert caught.value.filename == str(source)
    with pytest.raises(FileNotFoundError) as caught, files.naming(target), temporary_folder(target) as folder:
        (folder / "missing").open()
    assert caught.value.filename == str(target)
