"""Checkpoints: whole or not there, and honest about what is damaged, full or of another run."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metalens.training import CheckpointFolder, Corpus, checkpoint, train_loop
from metalens.training.checkpoint import RECORD, STATE
from metalens.utils.errors import MetalensError
from support.checkpoints import CONFIG, LENGTH, begun


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.fixture
def ids(rng):
    return rng.integers(0, 100, 6 * LENGTH)


def arrays(value=0.0):
    return {"a": mx.full((3, 5), value), "b": mx.full((4,), value, mx.bfloat16), "c": mx.array(int(value), mx.uint64)}


def save(folder, *steps):
    for step in steps:
        folder.save(step, arrays(step), {"about": [step, None, 0.1, float("inf")]})


def entries(folder):
    return sorted(entry.name for entry in folder.path.iterdir())


def test_what_is_written_is_read(folder):
    assert folder.latest() is None
    path = folder.save(7, arrays(2.0), {"about": "text"})
    assert path == folder.path / "step-00000007"
    found = folder.latest()
    assert {name: (a.dtype, np.array(a.astype(mx.float32)).tolist()) for name, a in found.arrays.items()} == {
        name: (a.dtype, np.array(a.astype(mx.float32)).tolist()) for name, a in arrays(2.0).items()
    }
    assert (found.record["step"], found.record["about"]) == (7, "text")
    assert folder.read(7).record == found.record
    with pytest.raises(OSError, match="step-00000008"):
        folder.read(8)


def test_the_newest_stay(tmp_path):
    for keep, expected in ((1, [90, 100]), (2, [90, 100]), (3, [80, 90, 100])):
        folder = CheckpointFolder(tmp_path / str(keep), keep)
        save(folder, *range(10, 101, 10))
        assert folder.steps() == expected
        assert len(entries(folder)) == len(expected)


def test_other_files_in_the_folder_are_left_alone(folder):
    for name in ("notes.txt", ".step-notes", ".step-00000001.tmp", "step-x"):
        (folder.path / name).write_text("mine")
    save(folder, 1, 2, 3)
    assert entries(folder) == [".step-00000001.tmp", ".step-notes", "notes.txt", "step-00000002", "step-00000003", "step-x"]


def test_it_does_not_depend_on_the_file_that_was_read(folder):
    """MLX reads lazily: what is resumed from must survive its own removal."""
    save(folder, 1)
    found = folder.latest()
    save(folder, 2, 3, 4)
    assert found.arrays["a"].tolist() == arrays(1)["a"].tolist()


def test_numpy_s_numbers_are_numbers(folder):
    folder.save(1, arrays(), {"a": np.int64(3), "b": [np.float32(0.5)], "c": np.bool_(True)})
    assert {name: folder.latest().record[name] for name in "abc"} == {"a": 3, "b": [0.5], "c": True}


def test_what_json_cannot_hold_leaves_nothing_behind(folder):
    save(folder, 1)
    with pytest.raises(TypeError, match="can't be written as JSON"):
        folder.save(2, arrays(), {"a": object()})
    assert entries(folder) == ["step-00000001"]


def damage_byte(file, position=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    file.write_bytes(content)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "a byte of the arrays": lambda path: damage_byte(path / STATE),
    "a byte of their header": lambda path: damage_byte(path / STATE, 3),
    "the end of the arrays": lambda path: os.truncate(path / STATE, (path / STATE).stat().st_size - 1),
    "all of the arrays": lambda path: os.truncate(path / STATE, 0),
    "no arrays": lambda path: (path / STATE).unlink(),
    "half of the record": lambda path: os.truncate(path / RECORD, (path / RECORD).stat().st_size // 2),
    "all of the record": lambda path: os.truncate(path / RECORD, 0),
    "no record": lambda path: (path / RECORD).unlink(),
    "zeros for the record": lambda path: (path / RECORD).write_bytes(bytes(100)),
    "no text": lambda path: (path / RECORD).write_bytes(b"\xff\xfe\x00"),
    "another list": lambda path: (path / RECORD).write_text("[1]"),
    "nothing in it": lambda path: (path / RECORD).write_text("null"),
    "no keys": lambda path: (path / RECORD).write_text("{}"),
    "another step": lambda path: edit(path / RECORD, step=9),
    "another position": lambda path: edit(path / RECORD, about=[3, None, 0.1, 2]),
    "another hash": lambda path: edit(path / RECORD, sha256="0" * 64),
    "a newer format": lambda path: edit(path / RECORD, format=checkpoint.FORMAT + 1),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
    "a file": lambda path: (shutil.rmtree(path), path.write_text("")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_falls_back_with_a_warning(folder, name):
    save(folder, 1, 2)
    DAMAGES[name](folder.path / "step-00000002")
    with pytest.warns(RuntimeWarning, match=r"step-00000002 can't be used \(.+\); the one before it is taken"):
        assert folder.latest().record["step"] == 1
    with pytest.raises((OSError, ValueError)):
        folder.read(2)
    DAMAGES[name](folder.path / "step-00000001")
    with pytest.warns(RuntimeWarning) as caught:
        assert folder.latest() is None
    assert len(caught) == 2


def test_a_newer_format_is_named(folder):
    save(folder, 1)
    edit(folder.path / "step-00000001" / RECORD, format=9)
    with pytest.warns(RuntimeWarning, match="it has format 9, this version reads 1"):
        folder.latest()


def test_any_flipped_bit_of_the_record_shows_or_does_not_matter(folder):
    save(folder, 1)
    file = folder.path / "step-00000001" / RECORD
    whole, expected = file.read_bytes(), folder.latest().record
    for position in range(0, len(whole), 3):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            record = folder.read(1).record
        except (OSError, ValueError):
            continue
        assert record == expected, (position, whole[position - 10 : position + 10])


def test_a_run_that_fell_back_replaces_what_it_fell_back_behind(folder):
    save(folder, 1, 2, 4)
    damage_byte(folder.path / "step-00000004" / STATE)
    save(folder, 3)
    assert folder.steps() == [2, 3]  # two that are whole
    save(folder, 4)
    assert folder.steps() == [3, 4]
    assert folder.latest().record["about"][0] == 4


def test_what_killed_processes_left_is_removed_before_room_is_needed(folder, monkeypatch):
    save(folder, 1)
    for name in (".step-00000002.1", f".step-00000003.{os.getpid()}"):
        (folder.path / name).mkdir()
        (folder.path / name / STATE).write_bytes(bytes(100))
    seen, original = [], mx.save_safetensors
    monkeypatch.setattr(mx, "save_safetensors", lambda *args: (seen.append(entries(folder)), original(*args)))
    save(folder, 4)
    assert seen == [[f".step-00000004.{os.getpid()}", "step-00000001"]]
    assert folder.steps() == [1, 4]


# A full disk


MLX_S = RuntimeError("[write] Unable to write 2951520 bytes to file.")
SYSTEM_S = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "error"), [("arrays", MLX_S), ("arrays", SYSTEM_S), ("fsync", SYSTEM_S), ("record", SYSTEM_S), ("rename", SYSTEM_S)]
)
def test_a_full_disk(folder, monkeypatch, where, error):
    save(folder, 1, 2)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}

    def fail(*args, **kwargs):
        raise error

    def half(file, arrays):
        file.write(b"half")
        raise error

    if where == "arrays":
        monkeypatch.setattr(mx, "save_safetensors", half)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(type(folder.path), {"record": "write_text", "rename": "rename"}[where], fail)
    with pytest.raises(OSError, match=r"Could not write the checkpoint .*step-00000003: .*(Unable to write|No space left).*Make room"):
        folder.save(3, arrays(3), {})
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert entries(folder) == ["step-00000001", "step-00000002"]
    assert folder.latest().record["step"] == 2


@pytest.fixture
def small_disk():
    """A disk of 1 MB. Not below tmp_path, which another session of pytest may move away."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs takes root")
    path = Path(tempfile.mkdtemp())
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        path.rmdir()
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
    path.rmdir()


@pytest.mark.parametrize(("rows", "fit"), [(1000, 2), (600, 4)])  # 400 and 240 kB each
def test_a_disk_that_is_really_full(small_disk, rows, fit):
    folder = CheckpointFolder(small_disk / "checkpoints", keep=9)
    for step in range(fit):
        folder.save(step, {"a": mx.full((rows, 100), step)}, {})
    for _ in range(2):
        with pytest.raises(OSError, match="Could not write the checkpoint"):
            folder.save(fit, {"a": mx.full((rows, 100), fit)}, {})
        assert len(entries(folder)) == fit  # no temporary that takes up room
    assert folder.steps() == list(range(fit))
    assert folder.latest().arrays["a"][0, 0].item() == fit - 1


def test_training_on_a_full_disk_goes_on_once_there_is_room(small_disk, tiny, ids):
    straight = train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), CONFIG)
    folder = CheckpointFolder(small_disk / "checkpoints")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(800_000))
    options = {"checkpoints": folder, "checkpoint_every": 1, "resume": True}
    with pytest.raises(OSError, match="Make room, and go on with resume"):
        train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), CONFIG, **options)
    assert folder.steps() in ([1], [1, 2])
    filler.unlink()
    lens = train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), CONFIG, **options)
    assert all(mx.array_equal(a.weight, b.weight) for a, b in zip(lens.translators, straight.translators, strict=True))


def test_a_folder_that_cannot_be_written(folder):
    shutil.rmtree(folder.path)
    folder.path.write_text("a file in its place")
    with pytest.raises(OSError, match="checkpoints"):
        folder.save(1, arrays(), {})


# Resuming


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(tiny, ids, folder):
    corpus, seen = Corpus.from_ids(ids), []
    straight = begun(tiny, corpus, folder)
    damage_byte(folder.path / "step-00000004" / STATE)
    with pytest.warns(RuntimeWarning, match="step-00000004 can't be used"):
        lens = train_loop(tiny.source, tiny.unembed, corpus, CONFIG, checkpoints=folder, resume=True, callbacks=[seen.append])
    assert [p.step for p in seen] == [3]
    assert all(mx.array_equal(a.weight, b.weight) for a, b in zip(lens.translators, straight.translators, strict=True))
    assert folder.steps() == [3, 4]
    assert folder.latest().record["step"] == 4  # whole again


def forge(folder, change):
    """Change the record of the newest checkpoint, and make its hash right."""
    path = folder.path / f"step-{folder.steps()[-1]:08d}" / RECORD
    record = json.loads(path.read_text())
    record.pop("record")
    change(record)
    path.write_text(json.dumps({**record, "record": checkpoint._sha256_of(record)}))


FORGED = {
    "no pass": lambda r: r.pop("pass"),
    "no position": lambda r: r.pop("position"),
    "no tokens": lambda r: r.pop("tokens"),
    "a pass that is none": lambda r: r.update({"pass": -1}),
    "a step that is none": lambda r: r.update({"pass_step": 99}),
    "a step of text": lambda r: r.update({"pass_step": [1]}),
    "a position of text": lambda r: r.update({"position": "start"}),
    "settings of text": lambda r: r.update({"config": "all"}),
    "no settings": lambda r: r.pop("config"),
    "a model of text": lambda r: r.update({"model": 3}),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_record_is_an_error_and_no_traceback(tiny, ids, folder, what):
    begun(tiny, Corpus.from_ids(ids), folder)
    forge(folder, FORGED[what])
    with pytest.raises(ValueError, match=r"lacks what a run goes on from|not the state of a sampler|run with other") as error:
        train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), CONFIG, checkpoints=folder, resume=True)
    assert isinstance(error.value, MetalensError)


@pytest.mark.parametrize("change", [lambda r: r.pop("sha256"), lambda r: r.pop("step"), lambda r: r.update(step="3")])
def test_a_forged_record_that_cannot_be_read_falls_back(tiny, ids, folder, change):
    begun(tiny, Corpus.from_ids(ids), folder)
    forge(folder, change)
    assert checkpoint.numbers_of_newest(folder.path)["step"] == 3
    with pytest.warns(RuntimeWarning, match=r"step-00000004 can't be used"):
        assert folder.latest().record["step"] == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_the_settings_of_the_newest_run_come_from_a_whole_record(tiny, ids, folder, content):
    begun(tiny, Corpus.from_ids(ids), folder)
    expected = checkpoint.config_of_newest(folder.path)
    assert expected["num_steps"] == CONFIG.num_steps
    (folder.path / "step-00000004" / RECORD).write_bytes(content)
    assert checkpoint.config_of_newest(folder.path) == expected
    (folder.path / "step-00000003" / RECORD).write_bytes(content)
    assert checkpoint.config_of_newest(folder.path) is None
    assert checkpoint.numbers_of_newest(folder.path) == {}


def test_steps_between_checkpoints_are_at_least_one(tiny, ids):
    for every in (0, -1):
        with pytest.raises(ValueError, match=f"checkpoint_every must be at least 1, or None, got {every}"):
            train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), CONFIG, checkpoint_every=every)


# ------------------------------------------------------------------ what is not ours stays


FOREIGN = ("step-by-step-notes", "step-1", "step-00000009", "rank-my-papers-of-2024", "rank-0-of-2")


@pytest.fixture
def mixed(folder):
    """Return a folder of a finished run in which a user has folders of similar names."""
    save(folder, 3, 4)
    save(CheckpointFolder(folder.path / "rank-1-of-2"), 3, 4)
    for name in FOREIGN:
        (folder.path / name).mkdir()
        (folder.path / name / "thesis.txt").write_text("precious")
    (folder.path / "step-00000002").symlink_to(folder.path / "rank-my-papers-of-2024")
    checkpoint.mark_finished(folder.path)
    return folder


def test_a_new_run_deletes_checkpoints_alone(mixed):
    checkpoint.prepare_folder(mixed.path, resume=False)
    assert entries(mixed) == sorted([*FOREIGN, "step-00000002"])
    assert all((mixed.path / name / "thesis.txt").read_text() == "precious" for name in FOREIGN)


def test_saving_deletes_checkpoints_alone(mixed):
    save(mixed, 5, 6, 7, 1)  # the run falls back behind 3 to 9
    assert {name for name in entries(mixed) if name.startswith("step")} == {*FOREIGN[:3], "step-00000001", "step-00000002"}
    with pytest.raises(OSError, match=r"Could not write the checkpoint .*step-00000009.*not empty"):
        save(mixed, 9)
    assert (mixed.path / "step-00000009" / "thesis.txt").read_text() == "precious"


def test_a_file_called_finished_that_is_a_users_stays(folder):
    save(folder, 1)
    (folder.path / "finished").write_text("what I have finished")
    checkpoint.prepare_folder(folder.path, resume=False)
    assert entries(folder) == ["finished"]


def test_a_leftover_of_a_killed_process_is_deleted_and_a_users_folder_is_not(folder):
    for name, file in ((".step-00000001.77", STATE), (".step-00000002.77", "notes.txt")):
        (folder.path / name).mkdir()
        (folder.path / name / file).write_text("x")
    save(folder, 5)
    assert entries(folder) == [".step-00000002.77", "step-00000005"]


def test_a_folder_of_any_bytes(tmp_path):
    folder = CheckpointFolder(tmp_path / os.fsdecode(b"bad\xff"))
    save(folder, 1)
    assert folder.latest().arrays["a"].tolist() == arrays(1)["a"].tolist()
