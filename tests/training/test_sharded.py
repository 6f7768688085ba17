"""A model that is divided among processes against the whole one: streams, lenses, scores, readings, commands, and what is refused.

All scenarios of as many processes run in one start: most of the time goes into starting them.
"""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import metalens
from metalens.cli import main as command
from metalens.estimate.memory import plan
from metalens.models.tensor_parallel import MODULES
from metalens.training import CheckpointFolder, Group
from support import launching
from support import sharded_worker as worker
from support.launching import needs_ring
from support.saved_models import save_zoo_model

EVEN = {"vocab_size": 132}  # qwen3_5 divides its head
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # each of two processes has whole groups of 32

# Models of two processes by name: label in the zoo, and how it is saved.
MODELS = {
    **{
        label: (label, {})
        for label in (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "kimi_k25"),
            *("llama", "llama-tied", "longcat_flash", "longcat_flash_ngram", "minimax_m3_vl", "ministral3", "mistral4", "qwen2", "qwen3"),
            *("qwen3_moe", "solar_open"),
        )
    },
    "minimax": ("minimax", {"num_key_value_heads": 2}),
    "step3p5": ("step3p5", {"num_attention_groups": 2}),
    "qwen3_5": ("qwen3_5", EVEN),
    "qwen3_5-repeated": ("qwen3_5-tied", {"num_key_value_heads": 1}),
    "qwen3_5_moe": ("qwen3_5_moe", EVEN),
    "llama-quantized": ("llama", {"quantized": True, **WIDE}),
    "qwen3_5-quantized": ("qwen3_5", {"quantized": True, **EVEN, **WIDE}),
    "qwen3_moe-quantized": ("qwen3_moe", {"quantized": True, **WIDE, "moe_intermediate_size": 64}),
    "llama-bfloat16": ("llama", {"dtype": mx.bfloat16}),
}
# Those that no lens can read, whole or divided, or that plain MLX cannot run on a CPU: the zoo's table says why.
NOT_READ = {"deepseek_v41", "iquestloopcoder", "kimi_k3", "prism_hadamard_qwen35", "muse_spark"}

PATIENCE = 600  # seconds for all scenarios, on a machine that has other work

SETTINGS = {"num_steps": 3, "max_seq_len": 16, "tokens_per_step": 96, "seed": 1, "learning_rate": 0.5}
SGD = {**SETTINGS, "recipe": "paper"}
WARM = {**SGD, "warm_start_tokens": 320, "ridge": 0.1, "guard_tokens": 64}
BY_LOSS = {**SGD, "optimizer": "muon", "step_size": "loss", "learning_rate": 0.05, "reduction": "sum"}
# Where four processes share two cores, every message waits until all of them had their turn: they run little.
TWO_LAYERS = {**BY_LOSS, "layers": [0, 2], "num_steps": 2, "embedding": False}
RUNS = {
    "sgd": {"model": "llama", "settings": SGD},
    "warm": {"model": "llama", "settings": WARM},
    "one-layer": {"model": "llama", "settings": {**BY_LOSS, "layers": [1], "guard_tokens": 64, "embedding": False}},  # the last process has no layer
    "experts": {"model": "qwen3_moe", "settings": WARM},
    "quantized": {"model": "llama-quantized", "settings": WARM},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and files for the commands."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, (label, how) in MODELS.items():
        save_zoo_model(folder / name, label, **how)
    save_zoo_model(folder / "four", "llama", num_key_value_heads=4)
    save_zoo_model(folder / "four-experts", "qwen3_moe", num_key_value_heads=4)
    save_zoo_model(folder / "gemma2", "gemma2")
    for rank in range(2):
        save_zoo_model(folder / f"seed-{rank}", "llama", seed=rank)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in worker.TEXT))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """The results of two processes, of which one dies in the last scenario."""
    command = ["--shard-model"]
    trains = ["train", "llama", "--data", "text.txt", "--join", "packed", "--out", "{rank}/lens", "--cache-dir", "cache", *command]
    trains += ["--steps", "2", "--max-seq-len", "16", "--tokens-per-step", "64", "--warm-start-tokens", "0"]
    lens = ["--lens", "{rank}/lens", "--json", *command]  # the last process has no such file
    scenarios = [{"name": f"streams-{name}", "do": "streams", "model": name} for name in MODELS]
    scenarios += [{"name": name, "do": "trained", "evaluate": name in ("warm", "experts"), **run} for name, run in RUNS.items()]
    kept = {"do": "trained", "model": "llama", "settings": WARM, "folder": "kept"}
    scenarios += [
        {"name": "stopped", **kept, "stop": 2},
        {"name": "resumed", **kept, "resume": True},
        {"name": "refused", "do": "streams", "model": "gemma2"},
        {"name": "other-files", "do": "streams", "model": "seed-{rank}"},
        {"name": "missing", "do": "streams", "model": "four/../seed-{rank}/../" + "{rank}" * 3},
        {"name": "other-ids", "do": "other_ids", "model": "llama"},
        {"name": "other-group", "do": "other_group", "model": "llama"},
        {"name": "train", "do": "cli", "arguments": trains},
        {"name": "data", "do": "cli", "arguments": [*trains, "--parallel", "data"]},
        {"name": "eval", "do": "cli", "arguments": ["eval", "llama", "--data", "text.txt", "--max-tokens", "60", *lens]},
        {"name": "transfer", "do": "cli", "arguments": ["eval", "llama", "--data", "text.txt", "--max-tokens", "20", "--layer-transfer", *lens]},
        {"name": "lens", "do": "cli", "arguments": ["lens", "llama", "w1 w2 w3", *lens]},
        {"name": "lost", **kept, "folder": "lost", "kill": 2},
    ]
    processes = launching.started(worker, 2, folder, scenarios)
    ends = launching.ended(processes, patience=PATIENCE)
    (out,) = (path for path in folder.glob("out-*") if path.is_dir())
    assert ends[1][0] == 3, ends[1][1]
    assert (out / "lost.0.json").exists(), ends[0][1]
    (out / "lost.1.json").write_text("null")
    return launching.written(out, 2)


@pytest.fixture(scope="module")
def four(folder):
    """The results of four processes."""
    scenarios = [
        {"name": "two-layers", "do": "trained", "model": "four", "settings": TWO_LAYERS, "scores": 17},
        {"name": "warm", "do": "trained", "model": "four-experts", "settings": WARM},
        {"name": "heads", "do": "streams", "model": "llama"},
    ]
    return launching.launched(worker, 4, folder, scenarios, PATIENCE)


@pytest.fixture(scope="module")
def alone(folder):
    """A function: the result of one process that has the whole model."""
    return lambda do, model, **what: getattr(worker, do)(Group(), str(folder / model), **what)


def assert_same_arrays(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@needs_ring
@pytest.mark.parametrize("name", MODELS)
def test_every_process_has_the_hidden_states_of_the_whole_model(two, alone, name):
    whole = alone("streams", name)
    for found in two[f"streams-{name}"]:
        assert_same_arrays(found["arrays"], whole["arrays"], 3e-2 if name.endswith("bfloat16") else 1e-5)
        assert {key: found[key] for key in ("hash", "paths", "head")} == {key: whole[key] for key in ("hash", "paths", "head")}
        assert found["native"] > 0
        assert found["bytes"] < 0.95 * whole["bytes"]
    first, second = two[f"streams-{name}"]
    assert first["arrays"][:-1] == second["arrays"][:-1]  # to the last bit: the lens of each layer is trained by one process


@needs_ring
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama-quantized", "qwen3_moe-quantized", "qwen3_5-quantized"])
def test_a_plan_knows_the_bytes_of_a_process(two, folder, name):
    expected = max(found["bytes"] for found in two[f"streams-{name}"])
    planned = plan(folder / name, processes=2, parallel="layers", shard_model=True, num_steps=1).memory.model
    assert expected <= 1.1 * planned
    assert planned <= 1.1 * expected


@needs_ring
def test_the_zoo_has_all_that_can_be_divided(folder):
    labels = {label.partition("-")[0] for label, _ in MODELS.values()}
    assert labels | NOT_READ == set(MODULES)


# ------------------------------------------------------------------ lenses


def assert_same_run(found, whole, layers, tolerance):
    assert found["about"] == whole["about"]
    np.testing.assert_allclose(found["losses"], whole["losses"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["norms"], whole["norms"], rtol=1e-3)
    for layer in layers:
        assert_same_arrays(found["weights"][layer], whole["weights"][layer], tolerance)


@needs_ring
@pytest.mark.filterwarnings("ignore::metalens.training.guard.GuardWarning")
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_the_lens_of_one(two, alone, name):
    run = dict(RUNS[name])
    whole = alone("trained", run.pop("model"), evaluate="scores" in two[name][0], **run)
    moved = max(np.abs(np.array(w) - np.eye(len(w))).max() for w, _ in whole["weights"])
    assert moved > 1e-2  # it has learned something
    for rank, found in enumerate(two[name]):
        # A step of Muon makes all directions of a gradient equally long, those of rounding errors too.
        # The last process has every second of the embedding and the blocks: 0 and 2.
        assert_same_run(found, whole, range(3) if rank == 0 else range(0, 3, 2) if name != "one-layer" else [], 1e-3 if name == "one-layer" else 5e-5)
    if "scores" in two[name][0]:
        for found in two[name]:
            assert_same_scores(found, whole)


def assert_same_leaves(found, whole):
    flat, expected = leaves(found), leaves(whole)
    assert list(flat) == list(expected)
    for path, value in expected.items():
        assert flat[path] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-4)), path


def assert_same_scores(found, whole):
    assert_same_leaves(found["scores"], whole["scores"])
    for name, each in whole["marginals"].items():
        np.testing.assert_allclose(found["marginals"][name], each, rtol=1e-3, atol=1e-3)
    for layer, predictions in whole["reading"].items():
        theirs = found["reading"][str(layer)]
        assert [[token[0] for token in position] for position in theirs] == [[token[0] for token in position] for position in predictions]


def leaves(value, path=""):
    """{path: value} of everything in a JSON value."""
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in leaves(each, f"{path}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, each in enumerate(value) for k, v in leaves(each, f"{path}.{i}").items()}
    return {path: value}


@needs_ring
@pytest.mark.filterwarnings("ignore::metalens.training.guard.GuardWarning")
def test_four_processes_of_which_two_have_no_layer(four, alone):
    whole = alone("trained", "four", settings=TWO_LAYERS, scores=17)
    assert_same_run(four["two-layers"][0], whole, [0, 2], 1e-3)
    for found in four["two-layers"]:
        assert found["losses"] == four["two-layers"][0]["losses"]
        assert_same_leaves(found["scores"], whole["scores"])


@needs_ring
def test_four_processes_with_experts(four, alone):
    assert_same_run(four["warm"][0], alone("trained", "four-experts", settings=WARM), range(3), 5e-5)


@needs_ring
def test_a_run_that_was_stopped_goes_on(two):
    assert all("Stopped after step 2" in found["stopped"] for found in two["stopped"])
    for resumed, straight in zip(two["resumed"], two["warm"], strict=True):
        assert resumed["weights"] == straight["weights"]
        assert resumed["losses"] == straight["losses"][2:]


@needs_ring
def test_a_process_that_is_lost_is_an_error_within_seconds(two, folder):
    lost = two["lost"][0]
    assert "GroupLostError: Process 0 of 2 can't reach the others" in lost["error"]
    assert "Start all of them again with resume" in lost["error"]
    assert lost["seconds"] < 60
    assert CheckpointFolder(folder / "lost" / "rank-0-of-2").steps()[-1] == 2


# ------------------------------------------------------------------ what is refused


@needs_ring
def test_an_architecture_without_tensor_parallelism_is_refused_by_name(two):
    for found in two["refused"]:
        assert "InvalidValueError: mlx-lm can't divide the model 'gemma2' (gemma2) among processes" in found["error"]
        assert f"It has for {', '.join(MODULES)}." in found["error"]


@needs_ring
def test_a_number_of_processes_that_does_not_fit_the_heads_is_refused(four):
    for found in four["heads"]:
        assert "The model 'llama' can't be divided among 4 processes" in found["error"]
        assert "n_kv_heads is 2" in found["error"]
        assert "numbers of heads, 2 and 4" in found["error"]


@needs_ring
def test_processes_with_other_files_are_refused(two):
    for found in two["other-files"]:
        assert "model's file model.safetensors is " in found["error"]
        assert "in process 0 and " in found["error"]


@needs_ring
def test_a_model_that_one_process_does_not_find_ends_all(two):
    for rank, found in enumerate(two["missing"]):
        assert "There is no folder" in found["error"]
        assert str(rank) * 3 in found["error"]


@needs_ring
def test_processes_that_read_other_texts_are_refused(two):
    for found in two["other-ids"]:
        assert "InvalidValueError: Processes [1] read other token ids than process 0" in found["error"]


@needs_ring
def test_processes_that_hold_a_divided_model_cannot_divide_the_text(two):
    for found in two["other-group"]:
        assert "InvalidValueError: Processes that divide the model all read the same text" in found["error"]


class Ranks:
    """MLX's group, as far as ours looks at it."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_a_group_that_is_none(folder):
    with pytest.raises(TypeError, match=r"tensor_group must be a metalens.training.Group, not Ranks"):
        metalens.load(folder / "llama", tensor_group=Ranks(0, 2))


def test_a_module_cannot_be_divided(make_llama):
    with pytest.raises(ValueError, match="give the model's folder or hub id, not a module"):
        metalens.InterpretableModel(make_llama(), tensor_group=Group("layers", Ranks(0, 2)))
    with pytest.raises(ValueError, match="needs the name of a model"):
        metalens.train(make_llama(), [1, 2], shard_model=True)
    with pytest.raises(ValueError, match=r"group=Group.from_environment\('layers'\)"):
        metalens.train("demo", [1, 2], shard_model=True)


def test_a_group_of_one_loads_the_whole_model(folder):
    model = metalens.load(folder / "llama", tensor_group=Group("layers"))
    assert model.sharding is None


def test_plans_of_divided_models(folder):
    whole = plan("Llama-3.1-70B-4bit", processes=4, parallel="layers", num_steps=1)
    part = plan("Llama-3.1-70B-4bit", processes=4, parallel="layers", shard_model=True, num_steps=1)
    assert math.isclose(part.memory.model, whole.memory.model / 4, rel_tol=0.1)
    assert part.memory.translators == whole.memory.translators
    assert part.flops_per_token.forward == pytest.approx(whole.flops_per_token.forward / 4)
    assert part.flops_per_token.model_head == whole.flops_per_token.model_head
    tight = plan("Llama-3.1-70B-4bit", processes=4, parallel="layers", memory=part.total + 2**30, num_steps=1)
    assert (tight.advice[0].option, tight.advice[0].bytes, tight.advice[0].fits) == ("--shard-model", part.total, True)
    assert "--shard-model" not in str(plan("Llama-3.1-70B-4bit", processes=4, parallel="layers", shard_model=True, memory=2**30, num_steps=1).advice)
    with pytest.raises(ValueError, match="shard_model=True needs parallel='layers'"):
        plan(folder / "llama", processes=2, shard_model=True)
    with pytest.raises(ValueError, match=r"can't divide the model .* \(gemma2\)"):
        plan(folder / "gemma2", processes=2, parallel="layers", shard_model=True)


# ------------------------------------------------------------------ commands


@needs_ring
def test_the_commands_of_a_divided_model_print_what_they_print_of_the_whole_one(two, folder, monkeypatch):
    monkeypatch.chdir(folder)
    lens = ["--lens", "0/lens", "--json"]
    for name, arguments in (
        ("eval", ["eval", "llama", "--data", "text.txt", "--max-tokens", "60", *lens]),
        ("transfer", ["eval", "llama", "--data", "text.txt", "--max-tokens", "20", "--layer-transfer", *lens]),
        ("lens", ["lens", "llama", "w1 w2 w3", *lens]),
    ):
        first, second = two[name]
        assert (first["code"], second["code"], second["out"]) == (0, 0, ""), first["err"]
        whole = CliRunner().invoke(command, arguments)
        assert "another model" not in whole.stderr  # the lens knows the hash of the whole model
        assert_same_leaves(json.loads(first["out"]), json.loads(whole.stdout))


@needs_ring
def test_train_writes_one_lens(two, folder):
    assert [found["code"] for found in two["train"]] == [0, 0], two["train"][0]["err"]
    assert "Lens written to 0/lens.npz" in two["train"][0]["err"]
    lens = metalens.TunedLens.load(folder / "0" / "lens")
    assert [path.name for path in (folder / "1").iterdir()] == ["lens.checkpoints"]  # of its own layers
    assert all(not np.array_equal(np.array(t.weight), np.eye(64)) for t in lens.translators[:-1])


@needs_ring
def test_the_text_is_not_divided_beside_the_model(two):
    for found in two["data"]:
        assert found["code"] == 1
        assert "--shard-model and --parallel data exclude each other" in found["err"]
