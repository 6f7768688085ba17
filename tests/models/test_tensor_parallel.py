"""Dividing a model: what needs no other process. training/test_sharded.py has the rest."""

import contextlib

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear

from metalens import accelerate
from metalens.models import tensor_parallel
from metalens.models.sharding import Sharding
from metalens.models.weights import hash_in_parts, named_arrays, weights_hash
from support.saved_models import save_zoo_model


class Ranks:
    """MLX's group, as far as layers look at it."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


class ToldError(Exception):
    """What a process would send."""

    def __init__(self, message):
        self.message = message


class Processes:
    """One of several processes. The others' messages are known; without them, its own is raised."""

    def __init__(self, rank, size, messages=None):
        self.rank, self.size, self.group, self.messages = rank, size, Ranks(rank, size), messages

    def gather_json(self, value):
        if self.messages is None:
            raise ToldError(value)
        return self.messages

    def all_gather(self, array):
        if self.messages is None:
            raise ToldError(array)
        return mx.concatenate(self.messages)

    def together(self):
        return contextlib.nullcontext()


def exchanged(size, call):
    """What every process returns after one exchange of messages. `call` takes the process."""
    messages = []
    for rank in range(size):
        with pytest.raises(ToldError) as told:
            call(Processes(rank, size))
        messages.append(told.value.message)
    return [call(Processes(rank, size, messages)) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_processes_hash_a_model_in_parts(make_llama, size):
    model = make_llama()

    def hashed(processes):
        arrays = named_arrays(model)
        found = hash_in_parts(arrays, processes.rank, size, processes.gather_json)
        assert not arrays  # it may be freed
        return found

    assert set(exchanged(size, hashed)) == {weights_hash(model)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7, 3), (2, 0)])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_rows_of_all_processes_arrive_bit_for_bit(rng, shape, size):
    whole = rng.normal(size=shape) * 1e-300

    def gathered(processes):
        sharding = Sharding(processes, "")
        mine = np.zeros(shape)
        own = sharding.layers_of(range(shape[0]))
        mine[own] = whole[own]
        return sharding.gathered(mine)

    for found in exchanged(size, gathered):
        assert np.array_equal(found, whole)


def test_processes_that_read_other_ids_say_so():
    texts = [mx.array([[1, 2, 3]]), mx.array([[1, 2, 4]]), mx.array([[1, 2, 3]])]
    with pytest.raises(ValueError, match=r"Processes \[1\] read other token ids than process 0"):
        exchanged(3, lambda processes: Sharding(processes, "").require_same_ids(texts[processes.rank]))
    exchanged(3, lambda processes: Sharding(processes, "").require_same_ids(texts[0]))


# ------------------------------------------------------------------ layers

FORMATS = {
    "float32": lambda layer: layer,
    "bfloat16": lambda layer: layer.set_dtype(mx.bfloat16) or layer,
    "affine 4": lambda layer: layer.to_quantized(32, 4),
    "affine 8": lambda layer: layer.to_quantized(64, 8),
    "mxfp4": lambda layer: layer.to_quantized(32, 4, mode="mxfp4"),
}


@pytest.fixture
def summed(monkeypatch):
    """Sums over a group that another process has nothing to add to: what this process sends is kept."""
    sent = []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: sent.append(x) or x)
    return sent


@pytest.mark.parametrize("tokens", [1, 7, 65])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["all-to-sharded", "sharded-to-all"])
@pytest.mark.parametrize("name", FORMATS)
def test_divided_layers_run_natively(summed, rng, name, how, bias, tokens):
    mx.random.seed(0)
    whole = FORMATS[name](nn.Linear(192, 66, bias=bias))
    layer = shard_linear(whole, how, group=Ranks(1, 3))
    rows, columns = (22, 192) if how == "all-to-sharded" else (66, 64)
    x = mx.array(rng.normal(size=(2, tokens, columns)).astype(np.float32)).astype(mx.bfloat16 if name == "bfloat16" else mx.float32)
    plain = layer(x)
    switched = accelerate(nn.Sequential(layer))
    assert len(switched) == 1
    found = layer(x)
    assert isinstance(layer, nn.Module)
    assert (found.shape, found.dtype) == ((2, tokens, rows), plain.dtype)
    weight = np.array(layer["weight"].astype(mx.float32)) if "scales" not in layer else np.array(dequantized(layer))
    exact = np.array(x.astype(mx.float32), np.float64) @ weight.astype(np.float64).T
    if bias:
        exact = exact + np.array(layer["bias"].astype(mx.float32), np.float64)
    error, of_plain = (np.abs(np.array(each.astype(mx.float32)) - exact).max() for each in (found, plain))
    rounding = 2.0**-7 if name == "bfloat16" and bias else 1e-6  # plain MLX adds the bias before it rounds, and rounds once
    assert error <= of_plain + rounding * np.abs(exact).max()
    assert len(summed) == (2 if how == "sharded-to-all" else 0)  # one of the plain layer, one of ours
    if summed and bias:  # the bias is added once, after the sum
        assert not np.allclose(np.array(summed[1].astype(mx.float32)), np.array(found.astype(mx.float32)), atol=1e-4)
    switched.undo()
    assert mx.array_equal(layer(x), plain)


def dequantized(layer):
    return mx.dequantize(layer["weight"], layer["scales"], layer.get("biases"), layer.group_size, layer.bits, layer.mode).astype(mx.float32)


@pytest.mark.parametrize("name", ["float32", "affine 4"])
def test_a_divided_head_is_made_whole(name):
    whole = FORMATS[name](nn.Linear(64, 96, bias=False))
    parts = [shard_linear(whole, "all-to-sharded", group=Ranks(rank, 3)) for rank in range(3)]

    class Group(Processes):
        def all_gather(self, array):
            name = next(name for name, value in parts[0].parameters().items() if value is array)
            return mx.concatenate([part[name] for part in parts])

    found = tensor_parallel._whole_linear(parts[0], Group(0, 3))
    x = mx.random.normal((2, 64))
    assert mx.array_equal(found(x), whole(x))
    assert type(found) is type(whole)


# ------------------------------------------------------------------ the hub


def test_the_weights_of_a_repository_are_downloaded_after_the_check(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns=None, **_):
        asked.append((name, allow_patterns))
        return tmp_path / name.rpartition("/")[2]

    monkeypatch.setattr(mlx_lm.utils, "_download", download)
    for label in ("gemma2", "llama"):
        save_zoo_model(tmp_path / label, label)
    with pytest.raises(ValueError, match=r"can't divide the model .*gemma2"):
        tensor_parallel._folder_of("them/gemma2")
    assert asked == [("them/gemma2", ["*.json"])]
    asked.clear()
    assert tensor_parallel._folder_of("them/llama") == tmp_path / "llama"
    assert asked == [("them/llama", ["*.json"]), ("them/llama", None)]


@pytest.mark.parametrize("change", ["config", "weights"])
def test_the_fingerprint_of_files_tells_models_apart(tmp_path, change):
    for i in range(2):
        save_zoo_model(tmp_path / str(i), "llama")
    save_zoo_model(tmp_path / "2", "llama", **({"seed": 1} if change == "weights" else {"rope_theta": 2.0}))
    first, same, other = (tensor_parallel._facts(tmp_path / str(i)) for i in range(3))
    assert first == same
    assert [name for name in first if first[name] != other[name]] == [
        "model's config.json" if change == "config" else "model's file model.safetensors"
    ]


def test_a_fingerprint_takes_the_same_time_for_every_size(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)  # a terabyte
    before = tensor_parallel._fingerprint(file, 1 << 40)
    with file.open("r+b") as changed:
        changed.seek((1 << 40) // tensor_parallel.PIECES * 77)
        changed.write(b"\x01")
    assert tensor_parallel._fingerprint(file, 1 << 40) != before
