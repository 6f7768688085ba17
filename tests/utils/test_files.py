import os
import stat

import pytest

from metalens.utils.files import atomic_write, require_writable


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
