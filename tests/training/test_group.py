"""A Group by itself: one process that thinks that it is one of several, without a launcher."""

import math

import mlx.core as mx
import numpy as np
import pytest

from metalens.training import CheckpointFolder, Group, TrainingConfig, TrainingInterruptedError, distributed, messages, train_loop
from metalens.training.resume import RunCheckpoints, RunFacts
from support import distributed_worker as worker

LENGTH, LAYERS = worker.LENGTH, worker.LAYERS


@pytest.fixture(scope="module")
def model():
    return worker.model()


class Ranks:
    """MLX's group, as far as ours looks at it."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.fixture
def echoing(monkeypatch):
    """Every process of the group has what this one has; gives the sizes of the sums."""
    sizes = []

    def all_sum(x, group):
        sizes.append(x.nbytes)
        return x * mx.array(group.size(), x.dtype)

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: mx.concatenate([x] * group.size()))
    return sizes


@pytest.mark.parametrize("room", [1, 2, 5, 7, 12, 1000])
def test_sums_are_cut_into_buckets_and_put_together_again(echoing, monkeypatch, rng, room):
    monkeypatch.setattr(messages, "BUCKET_BYTES", 4 * room)
    shapes = [(), (5,), (0,), (2, 3), (1, 1, 1), (4, 0), (7, 3)]
    values = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    group = Group("data", Ranks(1, 3))
    found = group.all_sum(*map(mx.array, values))
    for a, b in zip(found, values, strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.array(a), 3 * b)
    elements = sum(math.prod(shape) for shape in shapes)
    assert echoing == [4 * room] * (elements // room) + ([4 * (elements % room)] if elements % room else [])
    assert group.messages == len(echoing)


@pytest.mark.usefixtures("echoing")
def test_the_memory_for_sums_does_not_grow_with_the_gradients(monkeypatch):
    monkeypatch.setattr(messages, "BUCKET_BYTES", 2**18)
    gradients = [{"weight": mx.ones((300, 300)), "bias": mx.ones((300,))} for _ in range(20)]
    mx.eval(gradients)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    total = Group("data", Ranks(0, 2)).sum_step(mx.ones((20,)), gradients)
    assert mx.get_peak_memory() - before < 4 * 2**18 + 2 * 300 * 300 * 4  # of 7 MB
    assert mx.get_active_memory() - before < 2**16
    assert all(np.all(np.array(value) == 2) for value in [total, *(value for gradient in gradients for value in gradient.values())])


def test_sums_are_of_float32(echoing):
    (total,) = Group("data", Ranks(0, 2)).all_sum(mx.array([1.0, 2.0], mx.bfloat16))
    assert total.dtype == mx.float32
    assert echoing == [8]


@pytest.mark.usefixtures("echoing")
def test_arrays_of_one_process_arrive_bit_for_bit(monkeypatch):
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: x)  # of the owner, and zeros
    arrays = {
        "float32": mx.array([[1.5, -0.0], [float("nan"), float("inf")]]),
        "bfloat16": mx.array([3.0, 1e-30], mx.bfloat16),
        "uint64": mx.array(np.array(2**63 + 5, np.uint64)),
        "empty": mx.zeros((0, 3)),
    }
    found = Group("data", Ranks(0, 2)).broadcast(arrays)
    assert list(found) == list(arrays)
    for name, a in arrays.items():
        assert (found[name].dtype, found[name].shape) == (a.dtype, a.shape)
        assert np.array_equal(np.array(found[name].reshape(-1).view(mx.uint8)), np.array(a.reshape(-1).view(mx.uint8)))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_every_layer_is_trained_once_by_one_process_in_as_many_passes(size, count, at_once):
    layers = [10 + i for i in range(count)]
    ours = [Group("layers", Ranks(rank, size)) for rank in range(size)]
    passes = [group.passes(layers, at_once) for group in ours]
    assert len({len(each) for each in passes}) == 1
    for of_ranks in zip(*passes, strict=True):
        assert sorted(layer for mine, _ in of_ranks for layer in mine) == sorted(of_ranks[0][1])
        assert all(of_all == of_ranks[0][1] for _, of_all in of_ranks)
        assert all(at_once is None or len(mine) <= at_once for mine, _ in of_ranks)
    assert [layer for _, of_all in passes[0] for layer in of_all] == layers
    for group, each in zip(ours, passes, strict=True):
        assert [layer for mine, _ in each for layer in mine] == group.layers_of(layers)


def test_a_group_of_one_sends_nothing(monkeypatch, model):
    monkeypatch.setattr(mx.distributed, "all_sum", None)
    monkeypatch.setattr(mx.distributed, "all_gather", None)
    for parallel in ("data", "layers"):
        assert (
            train_loop(model.source, model.unembed, worker.text(), TrainingConfig(num_steps=1, max_seq_len=LENGTH), group=Group(parallel)).num_layers
            == 3
        )


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    group = Group("data", Ranks(0, 2))
    monkeypatch.setattr(group, "gather_json", lambda what: [what, "OSError: disk full"])
    with pytest.raises(ValueError, match="Process 1 of 2 failed: OSError: disk full"), group.together():
        pass
    with pytest.raises(KeyError, match="mine"), group.together():
        raise KeyError("mine")


def test_layers_whose_newest_checkpoints_differ_go_on_from_the_newest_that_all_have(monkeypatch, model, tmp_path):
    config = TrainingConfig(num_steps=4, max_seq_len=LENGTH)
    saved = CheckpointFolder(tmp_path / "rank-0-of-2")
    with pytest.raises(TrainingInterruptedError):
        train_loop(model.source, model.unembed, worker.text(), config, checkpoints=saved, checkpoint_every=1, stop=lambda: bool(saved.steps()[1:]))
    assert saved.steps() == [2, 3]
    group = Group("layers", Ranks(0, 2))
    checkpoints = RunCheckpoints(CheckpointFolder(tmp_path), group, RunFacts(config, model.source, model.unembed))
    for others, expected in ((3, 3), (2, 2), (4, 3)):
        monkeypatch.setattr(group, "gather_json", lambda what, others=others: [what, others if isinstance(what, int) else None])
        assert checkpoints.newest().record["step"] == expected
    monkeypatch.setattr(group, "gather_json", lambda what: [what, -1 if isinstance(what, int) else None])
    with pytest.raises(ValueError, match=r"Processes \[1\] find no checkpoint"):
        checkpoints.newest()


@pytest.mark.parametrize(("arguments", "message"), [({"parallel": "tokens"}, "parallel must be"), ({"timeout": 0}, "timeout must be positive")])
def test_a_group_of_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Group(**arguments)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*distributed._WORLD_SIZES, *distributed._LISTS, "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
def test_a_process_that_was_started_alone_is_a_group(monkeypatch, tmp_path):
    group = Group.from_environment("layers", timeout=5)
    assert (group.rank, group.size, group.parallel, group.timeout, group.group) == (0, 1, "layers", 5, None)
    (tmp_path / "hosts").write_text("\n")  # what `mlx.launch -n 1` makes
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert Group.from_environment().size == 1


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "MLX_IBV_DEVICES"])
def test_a_process_that_cannot_reach_the_others_says_so(monkeypatch, tmp_path, variable):
    (tmp_path / "devices").write_text("[[null], [null]]")
    monkeypatch.setenv(variable, "2" if variable.endswith("SIZE") else str(tmp_path / "devices"))
    monkeypatch.setattr(mx.distributed, "init", lambda: Ranks(0, 1))
    with pytest.raises(RuntimeError, match="one of 2 processes, and MLX can't reach the others"):
        Group.from_environment()


@pytest.mark.usefixtures("no_launcher")
def test_a_backend_that_fails_says_so(monkeypatch):
    def fails():
        raise RuntimeError("[ring] Couldn't connect (error: 111)")

    monkeypatch.setattr(mx.distributed, "init", fails)
    with pytest.raises(RuntimeError, match="MLX can't reach the other processes: .*Couldn't connect"):
        Group.from_environment()
