"""Several processes against one: what they compute, what happens when one ends, and what they refuse.

The processes are started as users start them, by mlx.launch with the ring backend, on this machine's loopback; those that have to die are started
without it, since mlx.launch ends all others when one ends. What only a cluster can show: MPI, JACCL and NCCL; GPUs; networks that lose connections;
machines of different kinds; what several machines gain in speed.
"""

import json
import re
import signal

import numpy as np
import pytest

from metalens import TunedLens
from metalens.training import CheckpointFolder, Group
from metalens.training.messages import EXIT_STATUS
from support import distributed_worker as worker
from support import launching, oracle
from support.launching import ended, needs_ring

LENGTH, LAYERS = worker.LENGTH, worker.LAYERS
STEP = 6 * LENGTH

SETTINGS = {"num_steps": 3, "max_seq_len": LENGTH, "tokens_per_step": STEP, "seed": 1, "learning_rate": 0.5}
BY_LOSS = {"optimizer": "muon", "step_size": "loss", "learning_rate": 0.1, "reduction": "sum", "guard_tokens": 64}
WILD = {"learning_rate": 1e4, "gradient_clip": 1e4, "guard_tokens": 64}  # every layer goes back to where it began

# Scenarios by name: what the processes divide, settings, and the settings of one process that give the same.
SAME = {
    "data": ("data", SETTINGS, {}),
    "data-adam-low-rank": ("data", SETTINGS | {"optimizer": "adam", "learning_rate": 1e-2, "rank": 2}, {}),
    "data-one-sequence": ("data", SETTINGS | {"tokens_per_step": None}, {}),
    "data-warm": ("data", SETTINGS | {"warm_start_tokens": 20 * LENGTH}, {}),
    "data-warm-one-sequence": ("data", SETTINGS | {"warm_start_tokens": LENGTH, "ridge": 0.1, "learning_rate": 0.01}, {}),
    "data-guard": ("data", SETTINGS | WILD | {"warm_start_tokens": 20 * LENGTH}, {}),
    "data-shuffled": ("data", SETTINGS | {"num_steps": 7, "shuffle_tokens": 3 * STEP}, {}),
    "data-by-the-loss": ("data", SETTINGS | BY_LOSS, {}),
    "layers": ("layers", SETTINGS, {}),
    "layers-guard": ("layers", SETTINGS | WILD | {"warm_start_tokens": 20 * LENGTH}, {}),
    "layers-by-the-loss": ("layers", SETTINGS | BY_LOSS | {"warm_start_tokens": 20 * LENGTH}, {}),
    "layers-muon": ("layers", SETTINGS | {"optimizer": "muon", "learning_rate": 0.02, "reduction": "sum"}, {}),
    "layers-warm-adam-bfloat16": ("layers", SETTINGS | {"optimizer": "adam", "warm_start_tokens": 20 * LENGTH, "dtype": "bfloat16"}, {}),
    "layers-sampled": ("layers", SETTINGS | {"vocabulary": 24}, {}),
    "layers-shuffled": ("layers", SETTINGS | {"shuffle_tokens": 2 * STEP, "vocabulary": 24}, {}),
    "layers-some": ("layers", SETTINGS | {"layers": [2, 0]}, {}),
    "layers-shift": ("layers", SETTINGS | {"loss": "ce"}, {}),
    "layers-at-once": ("layers", SETTINGS | {"layers_at_once": 1}, {"layers_at_once": "ranks"}),
}


@pytest.fixture(scope="module")
def model():
    return worker.model()


@pytest.fixture(scope="module")
def alone(model):
    """A function that gives one process's result."""
    return lambda **what: worker.scenario(model, Group(), **what)


def flat(result):
    """All weights and biases, less the identity that training starts from."""
    start = TunedLens(LAYERS, worker.HIDDEN)
    pairs = zip(result["weights"], start.translators, strict=True)
    return np.concatenate([np.ravel(np.array(a) - np.array(b)) for (w, bias), t in pairs for a, b in ((w, t.weight), (bias, t.bias))])


# Processes that divide the text draw a sample of the vocabulary for each part of a step, so that their lens is another one than that of one process.
SAMPLED = SETTINGS | {"vocabulary": 24}

# Four processes on two cores take 50 ms for a message, since ring's threads wait in a loop: they run what is different for four.
WITH_FOUR = ["data", "data-one-sequence", "data-warm-one-sequence", "layers", "layers-some", "layers-shift", "layers-at-once", "bad-layer"]
WITH_FOUR += ["not-alike", "stopped-data", "resumed-data", "stopped-layers", "resumed-layers"]
with_two = pytest.mark.parametrize("together", [2], indirect=True)
with_two_and_four = pytest.mark.parametrize("together", [2, 4], indirect=True)


def with_each(parallel):
    """Two processes with all of SAME that divide this, four with those of WITH_FOUR."""
    cases = [(n, name) for n in (2, 4) for name in SAME if name.startswith(parallel) and (n == 2 or name in WITH_FOUR)]
    return pytest.mark.parametrize(("together", "name"), cases, indirect=["together"])


@pytest.fixture(scope="module")
def launches():
    """What `together` gives, by the number of processes: started once each, in whatever order the tests come."""
    return {}


@pytest.fixture
def together(request, launches, tmp_path_factory):
    """(number of processes, their folder, the results of all scenarios that one start can have)."""
    n = request.param
    if n not in launches:
        launches[n] = all_scenarios(n, tmp_path_factory.mktemp("together"))
    return launches[n]


# Runs of divided layers that start from a lens, by name: settings, and the blocks of process 1 of 2.
FROM_LENS = {
    "from-lens-embedding": (SETTINGS | {"embedding": True}, [0, 2]),
    "from-lens-some": (SETTINGS | {"layers": [0, 2]}, [2]),
}


def all_scenarios(n, folder):
    last = n - 1
    oracle.random_lens(np.random.default_rng(2), LAYERS, worker.HIDDEN).save(folder / "start")
    kept = {"settings": SETTINGS, "every": 1}
    scenarios = [{"name": name, "parallel": parallel, "settings": settings} for name, (parallel, settings, _) in SAME.items()]
    scenarios += [
        {"name": name, "parallel": "layers", "settings": settings, "start": str(folder / "start")} for name, (settings, _) in FROM_LENS.items()
    ]
    scenarios += [
        {"name": "data-sampled", "parallel": "data", "settings": SAMPLED},
        {"name": "buckets", "parallel": "data", "settings": SETTINGS, "bucket": 5000},
        {"name": "bad-layer", "parallel": "layers", "settings": SETTINGS, "poisoned": [1, 1]},
        {"name": "not-alike", "parallel": "data", "settings": SETTINGS, "other_settings": {"num_steps": 5, "learning_rate": 0.25}},
        # The checkpoints of every rank in a folder of its own, as on machines without a common disk.
        {"name": "stopped-data", "parallel": "data", "folder": "data-{rank}", "stops": [last, 1], "metrics": "data.jsonl", **kept},
        {"name": "resumed-data", "parallel": "data", "folder": "data-{rank}", "resume": True, "metrics": "data.jsonl", **kept},
        {"name": "left-data", "parallel": "data", "folder": "left", "stops": [0, 0], **kept},
        {"name": "stopped-layers", "parallel": "layers", "folder": "layers", "stops": [0, 1], **kept},
        {"name": "resumed-layers", "parallel": "layers", "folder": "layers", "resume": True, **kept},
        {"name": "again", "parallel": "layers", "folder": "layers", **kept},
        {"name": "other-division", "parallel": "data", "folder": "layers", "resume": True, **kept},
        {"name": "nothing-to-resume", "parallel": "data", "folder": "new", "resume": True, **kept},
    ]
    return n, folder, launching.launched(worker, n, folder, [each for each in scenarios if n == 2 or each["name"] in WITH_FOUR])


@needs_ring
@pytest.mark.filterwarnings("ignore::metalens.training.guard.GuardWarning")
@with_each("data")
def test_divided_data_give_the_lens_of_one_process_to_rounding(together, alone, name):
    n, _, results = together
    one, several = alone(settings=SAME[name][1]), results[name]
    for result in several:
        # Muon makes all directions of a gradient equally long, those of rounding errors too.
        np.testing.assert_allclose(flat(result), flat(one), rtol=1e-3, atol=2e-4 if name == "data-by-the-loss" else 2e-6)
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5, atol=1e-6)
        assert result["tokens"] == one["tokens"]
    assert len(several) == n
    assert len({json.dumps([result[what] for what in ("weights", "losses", "norms")]) for result in several}) == 1  # bit for bit the same


@needs_ring
@pytest.mark.filterwarnings("ignore::metalens.training.guard.GuardWarning")
@with_each("layers")
def test_divided_layers_give_the_lens_of_one_process_bit_for_bit(together, alone, name):
    n, _, results = together
    _, settings, instead = SAME[name]
    one = alone(settings=settings | {k: n for k in instead})
    for rank, result in enumerate(results[name]):
        for what in ("losses", "norms", "layers", "tokens"):
            assert result[what] == one[what], what
        layers = sorted(settings.get("layers", range(LAYERS)))
        own = layers[rank::n] if rank else layers
        for layer in range(LAYERS):
            if layer in own:
                assert result["weights"][layer] == one["weights"][layer]
            else:  # the identity
                assert np.array_equal(result["weights"][layer][0], np.eye(worker.HIDDEN))


@needs_ring
@with_two
@pytest.mark.parametrize("name", FROM_LENS)
def test_divided_layers_start_from_their_translators_of_a_lens(together, alone, name):
    _, folder, results = together
    settings, of_second = FROM_LENS[name]
    one, several = alone(settings=settings, start=str(folder / "start")), results[name]
    assert several[0]["weights"] == one["weights"]
    for result in several:
        assert result["losses"] == one["losses"]
    assert [several[1]["weights"][layer] for layer in of_second] == [one["weights"][layer] for layer in of_second]


@needs_ring
@with_two
def test_divided_data_with_a_sampled_vocabulary_give_all_processes_one_lens(together, alone):
    _, _, results = together
    several, one, full = results["data-sampled"], alone(settings=SAMPLED), alone(settings=SETTINGS)
    assert len({json.dumps([result[what] for what in ("weights", "losses", "norms")]) for result in several}) == 1
    assert several[0]["losses"] != one["losses"]
    assert several[0]["tokens"] == one["tokens"]
    for losses in (several[0]["losses"], one["losses"]):
        np.testing.assert_allclose(np.mean(losses, axis=1), np.mean(full["losses"], axis=1), rtol=0.2)


@needs_ring
@with_two
def test_gradients_travel_once_per_step_in_full_buckets(together):
    _, _, results = together
    whole, small = results["data"][0]["sums"], results["buckets"][0]["sums"]
    step = 4 * (LAYERS * (worker.HIDDEN**2 + worker.HIDDEN + 1) + 1)  # gradients, losses and the number of tokens, float32
    assert whole == [step, 4] * 3  # and whether any process wishes to stop
    assert small == ([5000] * (step // 5000) + [step % 5000, 4]) * 3
    np.testing.assert_allclose(flat(results["buckets"][0]), flat(results["data"][0]), rtol=1e-3, atol=2e-6)  # the ring adds in another order


@needs_ring
@with_two_and_four
def test_a_step_that_is_not_finite_in_one_processs_layer_is_skipped_by_all(together, alone):
    n, _, results = together
    with pytest.warns(RuntimeWarning, match="not finite"):
        one = alone(settings=SETTINGS, poisoned=[1, 1])
    assert one["skipped"] == 1
    assert [result["skipped"] for result in results["bad-layer"]] == [1] * n
    assert results["bad-layer"][0]["weights"] == one["weights"]


@needs_ring
@with_two_and_four
def test_processes_that_were_started_with_different_settings_refuse(together):
    n, _, results = together
    assert [result["steps"] for result in results["not-alike"]] == [0] * n
    for result in results["not-alike"]:
        assert result["error"].startswith("InvalidValueError: The processes of this run were started with different settings")
        assert "num_steps is 3 in process 0 and 5 in process 1" in result["error"]
        assert "learning_rate is 0.5 in process 0 and 0.25 in process 1" in result["error"]


@needs_ring
@with_two_and_four
@pytest.mark.parametrize("parallel", ["data", "layers"])
def test_one_process_stops_all_and_resuming_gives_what_a_run_without_the_stop_gives(together, parallel):
    n, _, results = together
    assert [result["error"] for result in results[f"stopped-{parallel}"]] == ["TrainingInterruptedError: Stopped after step 2."] * n
    assert len(results[f"resumed-{parallel}"][0]["losses"]) == 1
    for resumed, straight in zip(results[f"resumed-{parallel}"], results[parallel], strict=True):
        assert resumed["weights"] == straight["weights"]
        assert resumed["losses"] == straight["losses"][2:]


@needs_ring
@with_two_and_four
def test_only_rank_0_writes(together):
    n, folder, results = together
    assert CheckpointFolder(folder / "data-0").steps() == [2, 3]
    assert not [path for rank in range(1, n) for path in (folder / f"data-{rank}").iterdir()]
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["losses"] for line in lines] == results["data"][0]["losses"]


@needs_ring
@with_two_and_four
def test_each_process_keeps_its_own_layers(together):
    n, folder, _ = together
    assert sorted(path.name for path in (folder / "layers").iterdir()) == [f"rank-{rank}-of-{n}" for rank in range(n)]
    assert all(CheckpointFolder(folder / "layers" / f"rank-{rank}-of-{n}").steps() == [2, 3] for rank in range(n))


@needs_ring
@with_two
def test_checkpoints_of_a_run_that_was_divided_otherwise_are_refused(together, alone):
    n, folder, results = together
    for result in results["other-division"]:
        assert f"has checkpoints of a run that had its layers divided among {n} processes" in result["error"]
    assert all("has checkpoints already" in result["error"] for result in results["again"])
    assert "had its layers divided" in alone(settings=SETTINGS, folder=str(folder / "layers"), resume=True)["error"]


@needs_ring
@with_two
def test_a_first_run_may_ask_to_be_resumed(together):
    _, _, results = together
    assert results["nothing-to-resume"][0]["weights"] == results["data"][0]["weights"]


@needs_ring
@with_two
def test_one_process_goes_on_where_several_divided_the_data(together, alone):
    _, folder, results = together
    assert "Stopped after step 1" in results["left-data"][0]["error"]
    resumed = alone(settings=SETTINGS, folder=str(folder / "left"), every=1, resume=True)
    assert len(resumed["losses"]) == 2
    np.testing.assert_allclose(flat(resumed), flat(alone(settings=SETTINGS)), rtol=1e-3, atol=2e-6)


# (processes, what they divide, how process 1 ends in step 2)
DEATHS = [(2, "layers", "exit"), (4, "data", "SIGKILL")]


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """Runs of which one process died: by number [(status, stderr) by rank], and the results of two processes that resumed them."""
    folder = tmp_path_factory.mktemp("died")
    ends, resumes = [], []
    for i, (n, parallel, how) in enumerate(DEATHS):
        what = {"parallel": parallel, "settings": SETTINGS, "every": 1, "folder": f"checkpoints-{i}"}
        ends.append(ended(launching.started(worker, n, folder, [{"name": "died", **what, "ends": [1, 2, how]}])))
        resumes.append({"name": f"resumed-{i}", **what, "resume": True})
    worker.scenario(worker.model(), Group(), settings=SETTINGS, every=1, folder=str(folder / "checkpoints-alone"), stops=[0, 0])
    resumes.append(resumes[-1] | {"name": "resumed-alone", "folder": "checkpoints-alone"})
    return ends, launching.launched(worker, 2, folder, resumes)


@needs_ring
@pytest.mark.parametrize("i", range(len(DEATHS)))
def test_a_process_that_dies_ends_the_others(died, i):
    statuses, (n, _, how) = died[0][i], DEATHS[i]
    assert statuses[1][0] == {"exit": 3, "SIGKILL": -signal.SIGKILL}[how]
    for rank in set(range(n)) - {1}:
        status, error = statuses[rank]
        assert status == 1
        assert f"GroupLostError: Process {rank} of {n} can't reach the others" in error
        assert "Start all of them again with resume" in error


@needs_ring
@pytest.mark.parametrize("name", [*range(len(DEATHS)), "alone"])
def test_a_run_of_which_a_process_died_can_be_resumed_also_by_another_number_where_the_data_are_divided(died, alone, name):
    resumed, straight = died[1][f"resumed-{name}"], alone(settings=SETTINGS)
    if name == 0:  # layers
        assert resumed[0]["weights"] == straight["weights"]
    for result in resumed if name != 0 else resumed[:1]:
        np.testing.assert_allclose(flat(result), flat(straight), rtol=1e-3, atol=2e-6)
    assert len(resumed[0]["losses"]) == (2 if name == "alone" else 1)  # of 3


@needs_ring
def test_mlx_launch_ends_the_run_when_a_process_dies(tmp_path):
    with pytest.raises(AssertionError, match="the reason") as caught:
        launching.launched(worker, 2, tmp_path, [{"name": "died", "parallel": "data", "settings": SETTINGS, "ends": [1, 2, "raise"]}])
    # The other process loses its group, and may end before the launcher sees the first end. It then kills the one that it still finds.
    assert re.search(r"Node with rank [01] exited with code [1-9]", str(caught.value))


@needs_ring
def test_a_process_that_hangs_ends_the_others_after_the_time_limit(tmp_path):
    what = {"name": "hangs", "parallel": "data", "settings": SETTINGS, "ends": [1, 2, "SIGSTOP"], "timeout": 3}
    ((status, error),) = ended(launching.started(worker, 2, tmp_path, [what]), but=[1])
    assert status == EXIT_STATUS
    assert "Process 0 of 2 has waited for the others for 3 s" in error
