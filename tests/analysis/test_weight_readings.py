"""Weights read through a lens: against float64 NumPy, in packed formats, and with planted rows."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.analysis import coherence_auroc, random_directions, read_directions, read_weights, weight_readings
from metalens.models.block_matrices import head_circuit, number_of_heads, output_matrices
from metalens.ops import Weight
from metalens.utils.errors import InvalidTypeError, InvalidValueError
from support import oracle
from support.mocks import MockModel, WordTokenizer, tiny_llama
from zoo import build

DIM, VOCAB, LAYERS = 64, 131, 3


@pytest.fixture
def model(make_llama):
    return InterpretableModel(make_llama())


def expected_reading(model, rows, lens_matrix):
    """Return the logits [2, N, V] of rows [N, D] and of their opposites in float64, their probabilities, and sizes and cosines [N]."""
    turned = rows @ lens_matrix.T
    norm = model.model.model.norm
    n = oracle.rms_norm(np.stack([turned, -turned]), oracle.wide(norm.weight), norm.eps)
    z = n @ oracle.matrix(model.unembed.head.weight).T
    sizes, after = np.linalg.norm(rows, axis=1), np.linalg.norm(turned, axis=1)
    return z, oracle.softmax(z), sizes, (rows * turned).sum(1) / (sizes * after)


def assert_reading(found, model, rows, lens_matrix, k):
    z, p, sizes, cosines = expected_reading(model, rows, lens_matrix)
    order = np.argsort(-z, axis=-1, kind="stable")[..., :k]
    for side, (ids, probabilities) in enumerate(((found.top_ids, found.top_probabilities), (found.bottom_ids, found.bottom_probabilities))):
        np.testing.assert_allclose(probabilities, np.take_along_axis(p[side], order[side], -1), rtol=2e-4, atol=1e-6)
        agreeing = np.take_along_axis(z[side], ids, -1) - np.take_along_axis(z[side], order[side], -1)
        np.testing.assert_allclose(agreeing, 0, atol=1e-4)  # the same tokens, or equal ones
    np.testing.assert_allclose(found.sizes, sizes, rtol=1e-5)
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-4, atol=1e-5)
    u = oracle.matrix(model.unembed.head.weight)
    u = u - u.mean(0)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    for i in range(0, len(found), 7):
        both = []
        for ids in (found.top_ids[i], found.bottom_ids[i]):
            gram = u[ids] @ u[ids].T
            both.append((gram.sum() - np.trace(gram)) / (k * (k - 1)))
        assert found.coherence[i] == pytest.approx(max(both), abs=1e-4)


@pytest.mark.parametrize("which", ["mlp", "attention"])
def test_rows_of_packed_matrices_equal_float64(model, which, rng, monkeypatch):
    monkeypatch.setattr(weight_readings, "CHUNK", 50)  # several chunks, the last one smaller, none at a group's end
    lens = oracle.random_lens(rng)
    readings = list(read_weights(model, lens, which=which, layers=[2, 0], top_k=4))
    assert [(each.layer, each.path) for each in readings] == [(i, {"mlp": "mlp.down_proj", "attention": "self_attn.o_proj"}[which]) for i in (2, 0)]
    for found in readings:
        block = model.model.model.layers[found.layer]
        weight = Weight.from_layer(block.mlp.down_proj if which == "mlp" else block.self_attn.o_proj)
        assert len(found) == weight.shape[1]
        assert_reading(found, model, oracle.matrix(weight).T, oracle.wide(lens.translators[found.layer].weight), 4)


def test_the_logit_lens_and_some_rows(model):
    (whole,) = read_weights(model, layers=[1], top_k=3)
    (some,) = read_weights(model, layers=[1], rows=range(33, 65), top_k=3)
    assert len(some) == 32
    np.testing.assert_array_equal(some.top_ids, whole.top_ids[33:65])
    np.testing.assert_allclose(some.coherence, whole.coherence[33:65], rtol=1e-5)
    np.testing.assert_allclose(whole.cosines, 1, rtol=1e-5)
    rows = oracle.matrix(Weight.from_layer(model.model.model.layers[1].mlp.down_proj)).T
    assert_reading(whole, model, rows, np.eye(DIM), 3)


def test_a_planted_row_promotes_its_token():
    """A neuron that writes the unembedding of a token promotes this token, one that writes its opposite suppresses it."""
    network = tiny_llama(layers=2)
    network.model.norm.weight = mx.ones_like(network.model.norm.weight)
    # Unembedding rows that point apart: a row times itself is then its largest product.
    network.lm_head.weight = mx.array(np.linalg.qr(np.random.default_rng(1).normal(size=(96, 64)))[0].astype(np.float32))
    u = np.array(network.lm_head.weight)
    down = np.array(network.model.layers[1].mlp.down_proj.weight)
    planted = {3: 17, 90: 4}
    for neuron, token in planted.items():
        down[:, neuron] = 0.01 * u[token]
    down[:, 5] = -7 * u[40]
    network.model.layers[1].mlp.down_proj.weight = mx.array(down)
    (found,) = read_weights(InterpretableModel(network, WordTokenizer(96)), layers=[1], top_k=2)
    assert {neuron: int(found.top_ids[neuron, 0]) for neuron in planted} == planted
    assert found.bottom_ids[5, 0] == 40
    assert found.sizes[3] == pytest.approx(0.01 * np.linalg.norm(u[17]), rel=1e-4)
    assert found.texts[17] == "w17"


def test_rows_that_promote_like_tokens_are_coherent(rng):
    """A few tokens in families of like unembeddings: rows that write a family beat random directions, random rows do not."""
    families = rng.normal(size=(4, 64))
    u = np.concatenate([np.repeat(families, 4, axis=0) + 0.2 * rng.normal(size=(16, 64)), rng.normal(size=(80, 64))])
    network = tiny_llama(layers=1)
    network.lm_head.weight = mx.array(u.astype(np.float32))
    model = InterpretableModel(network)
    baseline = read_directions(model, random_directions(model, 60), 0, top_k=4)
    planted = read_directions(model, families, 0, top_k=4)
    assert coherence_auroc(planted, baseline, resamples=100).low > 0.9
    nothing = coherence_auroc(read_directions(model, random_directions(model, 60, seed=1), 0, top_k=4), baseline, resamples=100)
    assert abs(nothing.value - 0.5) < 0.2
    assert planted.coherence[planted.strongest(4)].tolist() == sorted(planted.coherence, reverse=True)


@pytest.mark.parametrize("packed", [True, False])
def test_the_circuits_of_heads(make_llama, packed):
    model = InterpretableModel(make_llama(bits=4 if packed else None))
    block = model.model.model.layers[1]
    attention = block.self_attn
    assert number_of_heads(block, DIM) == 4
    output, value = (oracle.matrix(Weight.from_layer(layer)) for layer in (attention.o_proj, attention.v_proj))
    value = value * oracle.wide(block.input_layernorm.weight)
    for head in range(4):
        whole = output[:, head * 16 : head * 16 + 16] @ value[head // 2 * 16 : head // 2 * 16 + 16]  # two heads share keys and values
        u, s, _ = np.linalg.svd(whole)
        sizes, directions = head_circuit(block, head, DIM).directions()
        np.testing.assert_allclose(sizes, s[:16], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.abs((directions * u.T[:16]).sum(1))[:8], 1, rtol=1e-4)
    readings = list(read_weights(model, which="ov", layers=[1], rows=range(3), top_k=2))
    assert [each.path for each in readings] == [f"head {i}" for i in range(4)]
    np.testing.assert_allclose(readings[-1].sizes, sizes[:3])
    with pytest.raises(InvalidValueError, match="heads 0 to 3"):
        head_circuit(block, 4, DIM)


@pytest.mark.parametrize("label", ["llama", "gpt2", "gpt_neox", "phi3", "mixtral", "qwen2_moe"])
def test_output_matrices_of_architectures(label):
    model = InterpretableModel(build(label))
    size = model.unembed.hidden_dim
    for which in ("mlp", "attention"):
        found = output_matrices(model.source.layers[0], which, size)
        assert found
        assert all(matrix.weight.shape[0] == size for matrix in found)
    if label in ("mixtral", "qwen2_moe"):
        assert len({matrix.path for matrix in output_matrices(model.source.layers[0], "mlp", size)}) > 1
    found = next(read_weights(model, layers=[0], rows=range(2), top_k=2))
    assert found.top_ids.shape == (2, 2)


def test_an_expert_is_a_matrix_of_its_own():
    model = InterpretableModel(build("mixtral"))
    matrices = output_matrices(model.source.layers[0], "mlp", model.unembed.hidden_dim)
    whole = np.array(model.source.layers[0].block_sparse_moe.switch_mlp.down_proj.weight)
    assert len(matrices) == len(whole)
    np.testing.assert_array_equal(np.array(matrices[1].weight.values), whole[1])
    assert matrices[1].path.endswith("down_proj[1]")


def test_an_adapter_is_read_merged(make_llama, rng):
    from mlx_lm.tuner.lora import LoRALinear

    network = make_llama(bits=None)
    layer = network.model.layers[0].mlp
    plain = np.array(layer.down_proj.weight)
    layer.down_proj = LoRALinear.from_base(layer.down_proj, r=4, scale=2.0)
    layer.down_proj.lora_b = oracle.random_array(rng, 4, DIM)
    ((path, weight),) = output_matrices(network.model.layers[0], "mlp", DIM)
    assert path == "mlp.down_proj"
    difference = 2 * np.array(layer.down_proj.lora_b).T @ np.array(layer.down_proj.lora_a).T
    np.testing.assert_allclose(np.array(weight.values), plain + difference, rtol=1e-4, atol=1e-5)


def test_json(model):
    (found,) = read_weights(model, layers=[0], rows=range(4), top_k=2)
    answer = found.to_dict([2])
    assert (answer["layer"], answer["matrix"], answer["lens"]) == (0, "mlp.down_proj", "logit lens")
    (row,) = answer["rows"]
    assert (row["row"], row["promotes"][0]["id"], len(row["suppresses"])) == (2, int(found.top_ids[2, 0]), 2)


def test_bad_input(model):
    with pytest.raises(InvalidValueError, match="no matrix 'gate'"):
        read_weights(model, which="gate")
    with pytest.raises(InvalidValueError, match="rows 0 to 127"):
        read_weights(model, rows=range(100, 200))
    with pytest.raises(InvalidTypeError, match="only an affine map"):
        read_weights(model, lambda h, _: h)
    with pytest.raises(InvalidValueError, match="top_k must be"):
        read_weights(model, top_k=0)
    with pytest.raises(InvalidValueError, match=r"finite numbers \[N, 64\]"):
        read_directions(model, np.zeros((2, 3)), 0)
    (one,) = read_weights(model, layers=[0], rows=range(3), top_k=1)
    assert np.isnan(one.coherence).all()
    with pytest.raises(InvalidValueError, match="two tokens"):
        coherence_auroc(one, one)
    with pytest.raises(InvalidValueError, match="ordered by"):
        one.strongest(2, "weight")
    with pytest.raises(InvalidValueError, match="no matrix 'attention'"):
        output_matrices(MockModel().layers[0], "attention", 32)
    assert isinstance(MockModel().layers[0].down, nn.Linear)
    assert [m.path for m in output_matrices(MockModel().layers[0], "down", 32)] == ["down"]


def test_a_fused_value_matrix_is_refused_by_name():
    block = InterpretableModel(build("gpt2")).source.layers[0]
    with pytest.raises(InvalidValueError, match="no value matrix of its own"):
        head_circuit(block, 0, output_matrices(block, "attention", block.ln_1.weight.size)[0].weight.shape[0])
