"""A sweep finishes every cell once: also after a kill, in several processes, and beside cells that fail."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from metalens.sweep import Results, read_sweep, run_sweep, workers
from metalens.sweep.cells import lens_cells
from metalens.utils.lock import LockedError, locked
from support.launching import environment, free_ports, needs_ring

COMMAND = "import sys; from metalens.cli import main; sys.argv[0] = 'metalens'; main()"
SHORT = '[[recipes]]\nname = "short"\nrecipe = "mlxterp"\nnum_steps = 3\nmax_seq_len = 16\n'
LONG = '[[recipes]]\nname = "long"\nrecipe = "mlxterp"\nnum_steps = 400\nmax_seq_len = 16\nrepeat = true\n'

# What two results of the same cell differ in.
TIMED = ("seconds", "core_seconds", "inputs", "resumed", "checksum")


def results(out):
    """{folder of a cell: its result without times and paths}, of all that are in a folder."""
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(out.glob("*/*/result.json"))}
    return {name: {k: v for k, v in each.items() if k not in TIMED} for name, each in found.items()}


def weights(out):
    """{folder of a lens: its arrays}."""
    return {file.parent.name: {k: v.tobytes() for k, v in np.load(file).items()} for file in sorted(out.glob("lenses/*/lens.npz"))}


def run(file, out, **options):
    sweep = read_sweep(file)
    return run_sweep(type(sweep)(**{**vars(sweep), "out": out}), **options)


def test_every_cell_is_run_once_and_not_again_unless_its_settings_differ(write, tmp_path):
    ran = []
    file, out = write(), tmp_path / "out"
    found = run(file, out, on_outcome=lambda outcome: ran.append(outcome.cell))
    # 2 models, 2 recipes; each lens is read on both models, which have one width.
    assert (len(found.lenses), len(found.evaluations), found.failures, found.stopped) == (4, 8, {}, False)
    assert ran == [*found.lenses, *found.evaluations]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    assert not list(out.glob("*/*/*.checkpoints"))
    ran.clear()
    run(file, out, on_outcome=lambda outcome: ran.append(outcome.cell))
    assert ran == []
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")} == before

    run(write(recipes=SHORT.replace("3", "4")), out, on_outcome=lambda outcome: ran.append(outcome.cell))
    assert [cell.kind for cell in ran] == ["lens"] * 2 + ["evaluation"] * 4
    ran.clear()
    run(write(evaluation="max_seq_len = 8"), out, on_outcome=lambda outcome: ran.append(outcome.cell))
    assert [cell.kind for cell in ran] == ["evaluation"] * 8


def test_a_lens_is_the_one_of_train_and_an_evaluation_that_of_evaluate(write, inputs, tmp_path):
    import metalens

    out = tmp_path / "out"
    found = run(write(models="ab", recipes=LONG.replace("400", "5")), out)
    lens = metalens.train(str(inputs / "a"), inputs / "train.txt", recipe="mlxterp", seed=0, num_steps=5, max_seq_len=16)
    mine = metalens.TunedLens.load(out / found.lenses[0].folder / "lens")
    for layer in lens.layers:
        assert np.array_equal(np.array(mine.translators[layer].weight), np.array(lens.translators[layer].weight))
    other = next(cell for cell in found.evaluations if cell.names["lens_model"] == "a" and cell.names["model"] == "b")
    with pytest.warns(UserWarning, match="remembers another model"):
        expected = metalens.evaluate(metalens.load(str(inputs / "b")), (inputs / "held.txt").read_text(), lens, max_seq_len=16, logit_stats=True)
    assert other.result(out)["evaluation"] == json.loads(json.dumps(expected.to_dict()))


def test_two_processes_equal_one_also_when_one_of_them_dies(write, tmp_path, monkeypatch):
    start, killed = workers._Worker.start, []

    def kill_the_first(self, cell):
        start(self, cell)
        if not killed:
            killed.append(cell.title)
            self._process.kill()

    monkeypatch.setattr(workers._Worker, "start", kill_the_first)
    file = write(recipes=SHORT, more="seeds = [0, 1]")
    found = run(file, tmp_path / "two", jobs=2)
    # The cell of the process that has died is a failure; another process has taken its place.
    assert list(found.failures) == killed
    assert "by signal 9" in found.failures[killed[0]]
    assert sum(cell.result(tmp_path / "two") is not None for cell in found.lenses) == 3
    run(file, tmp_path / "two")
    run(file, tmp_path / "one")
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@needs_ring
def test_the_processes_of_mlx_launch_divide_the_cells(write, tmp_path):
    file, port = write(recipes=SHORT), free_ports(2)
    run(file, tmp_path / "one")
    (tmp_path / "hosts").write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    command = [sys.executable, "-c", COMMAND, "sweep", str(file), "--out", str(tmp_path / "two")]
    where = environment() | {"MLX_HOSTFILE": str(tmp_path / "hosts"), "METALENS_CACHE": str(tmp_path / "cache")}
    ranks = [subprocess.Popen(command, env=where | {"MLX_RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    # Rank 0 has every second cell, and alone writes the report.
    assert all(text.count(": done,") == 3 for text in said)
    assert [text.count("Report written") for text in said] == [1, 0]
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_a_killed_sweep_goes_on_where_it_was(write, tmp_path):
    file, out = write(recipes=LONG, models="a", more="seeds = [0, 1]\ncheckpoint_every = 20"), tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "sweep", str(file), "--out", str(out)]
    process = subprocess.Popen(command, env=os.environ | {"METALENS_CACHE": str(tmp_path / "cache")}, stderr=subprocess.PIPE, text=True)
    first, second = lens_cells(read_sweep(file))
    wait_for(lambda: list((out / second.folder).glob("lens.checkpoints/step-*")), process)
    process.kill()
    process.communicate(timeout=120)
    finished = (out / first.folder / "result.json").stat().st_mtime_ns
    assert second.result(out) is None
    assert run(file, out).failures == {}
    assert (out / first.folder / "result.json").stat().st_mtime_ns == finished
    assert [cell.result(out)["resumed"] for cell in (first, second)] == [False, True]
    run(file, tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


def test_a_process_stops_with_a_checkpoint_when_the_one_that_started_it_ends(write, tmp_path):
    (cell,), out = lens_cells(read_sweep(write(recipes=LONG.replace("400", "100000"), models="a"))), tmp_path / "out"
    command = [sys.executable, "-m", "metalens.sweep.worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps([str(out), 20]) + "\n" + json.dumps(cell.to_dict()) + "\n")
    process.stdin.flush()
    wait_for(lambda: list((out / cell.folder).glob("lens.checkpoints/step-*")), process)
    answer, _ = process.communicate(timeout=120)  # closes its stdin, as the end of this process would
    assert json.loads(answer)[0] == "stopped"
    assert process.returncode == 0


def wait_for(there, process):
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_stop_ends_the_sweep_with_a_checkpoint(write, tmp_path):
    file, out, asked = write(recipes=LONG, models="a"), tmp_path / "out", []
    found = run(file, out, stop=lambda: asked.append(1) or len(asked) > 60)
    assert found.stopped
    assert found.evaluations == []
    assert list((out / found.lenses[0].folder).glob("lens.checkpoints/step-*"))
    assert not run(file, out).stopped
    assert found.lenses[0].result(out)["resumed"]


def test_cells_that_fail_are_named_and_the_others_go_on(write, inputs, tmp_path):
    too_long = '[[recipes]]\nname = "too long"\nrecipe = "mlxterp"\nnum_steps = 100000\nmax_seq_len = 16\n'
    file, out = write(models="a", recipes=LONG.replace("400", "2") + too_long), tmp_path / "out"
    found = run(file, out)
    assert list(found.failures) == ["lens a / too long / words / seed 0"]
    assert "Not enough text" in found.failures["lens a / too long / words / seed 0"]
    left = Results(out, found.lenses, found.evaluations)
    assert [cell.names["recipe"] for cell in left.missing] == ["too long"]
    assert [each.names["recipe"] for each in left.evaluations] == ["long"]


def test_two_sweeps_do_not_write_to_one_folder(write, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".lock", str(out)), pytest.raises(LockedError, match="Another run"):
        run(write(), out)


def test_a_damaged_result_is_no_result(write, tmp_path):
    file, out = write(models="a", recipes=LONG.replace("400", "2")), tmp_path / "out"
    cell = run(file, out).evaluations[0]
    whole = (out / cell.folder / "result.json").read_text()
    assert '"kl": ' in whole
    other_settings, other_number = whole.replace('"max_seq_len": 16', '"max_seq_len": 8', 1), whole.replace('"kl": ', '"kl": 1', 1)
    for damaged in ("", whole[: len(whole) // 2], "[]", other_settings, other_number):
        (out / cell.folder / "result.json").write_text(damaged)
        assert cell.result(out) is None
    run(file, out)
    assert cell.result(out)["evaluation"] == json.loads(whole)["evaluation"]
