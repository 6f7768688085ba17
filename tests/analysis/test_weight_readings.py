"""Weights read through a lens: against float64 NumPy, in packed formats, and with planted rows."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.analysis import coherence_auroc, concept_tokens, random_directions, read_directions, read_weights, weight_readings
from metalens.models import block_matrices
from metalens.models.block_matrices import head_circuit, number_of_heads, output_matrices
from metalens.models.blocks import follow
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


@pytest.mark.parametrize("tokens", [[7], [3, 99, 130], list(range(131))], ids=len)
def test_the_mass_of_chosen_tokens_against_float64(model, rng, tokens):
    lens = oracle.random_lens(rng)
    (found,) = read_weights(model, lens, layers=[1], top_k=2, tokens=tokens, rows=range(5, 90))
    rows = oracle.matrix(Weight.from_layer(model.model.model.layers[1].mlp.down_proj)).T[5:90]
    _, p, _, _ = expected_reading(model, rows, oracle.wide(lens.translators[1].weight))
    for ours, side in ((found.mass, p[0]), (found.opposite_mass, p[1])):
        np.testing.assert_allclose(ours, side[:, tokens].sum(axis=1), rtol=2e-4, atol=1e-7)
    order = np.argsort(-p[:, :, tokens].sum(axis=-1).max(axis=0), kind="stable")
    if len(tokens) < 131:  # the mass of all tokens is 1 for every row
        assert found.strongest(6, "mass").tolist() == order[:6].tolist()
    entry = found.to_dict([4])["rows"][0]
    assert (entry["mass"], entry["opposite_mass"]) == (found.mass[4], found.opposite_mass[4])
    (without,) = read_weights(model, lens, layers=[1], top_k=2, rows=range(5))
    assert without.mass is None
    with pytest.raises(ValueError, match="not by 'mass'"):
        without.strongest(2, "mass")
    directions = read_directions(model, rows.astype(np.float32), 1, lens, top_k=2, tokens=tokens)
    np.testing.assert_allclose(directions.mass, found.mass, rtol=1e-4, atol=1e-7)


def test_rows_of_a_planted_concept_come_first():
    """Three neurons write tokens of the concept, one of them with the other sign; another neuron writes a token of no concept."""
    network = tiny_llama(layers=2)
    network.model.norm.weight = mx.ones_like(network.model.norm.weight)
    network.lm_head.weight = 8 * mx.array(np.linalg.qr(np.random.default_rng(1).normal(size=(96, 64)))[0].astype(np.float32))
    u = np.array(network.lm_head.weight)
    down = np.array(network.model.layers[1].mlp.down_proj.weight)
    for neuron, token, sign in ((3, 17, 1), (90, 4, 1), (44, 30, -1), (60, 50, 1)):
        down[:, neuron] = sign * u[token]
    network.model.layers[1].mlp.down_proj.weight = mx.array(down)
    model = InterpretableModel(network, WordTokenizer(96))
    (found,) = read_weights(model, layers=[1], top_k=2, tokens=["w17", "w4", 30])
    assert set(found.strongest(3, "mass")) == {3, 90, 44}
    assert found.opposite_mass[44] > 0.5 > found.mass[44]
    assert max(found.mass[60], found.opposite_mass[60]) < 0.1


def test_the_tokens_of_a_concept():
    model = InterpretableModel(tiny_llama(), WordTokenizer(96))
    assert concept_tokens(model, ["w3", "", "w3 w4", "w9", "w3"]) == ([3, 9], ["w3 w4"])


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


def by_hand(label, heads, groups, width):
    """Rows of the values of each head in a fused matrix, from the layout that the architecture has."""
    first = {"gpt2": 2 * heads * width, "phi3": (heads + groups) * width, "gpt_bigcode": heads * width + groups * width}
    if label in first:
        return [first[label] + (head // (heads // groups)) * width + np.arange(width) for head in range(heads)]
    if label == "gpt_neox":  # query, key and value of each head
        return [(3 * head + 2) * width + np.arange(width) for head in range(heads)]
    per_group = heads // groups + 2  # internlm2: the queries of a group, its key, its value
    return [((head // (heads // groups)) * per_group + per_group - 1) * width + np.arange(width) for head in range(heads)]


@pytest.mark.parametrize("label", ["gpt2", "phi3", "gpt_neox", "internlm2", "gpt_bigcode"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_the_rows_of_a_fused_matrix(label, packed, fast):
    network = build(label)
    if packed:
        nn.quantize(network, group_size=32, bits=4)
    model = InterpretableModel(network, accelerate=fast)
    block, size = model.source.layers[1], model.unembed.hidden_dim
    matrix = output_matrices(block, "attention", size)[0]
    attention = follow(block, matrix.path.rpartition(".")[0])
    fused = next(getattr(attention, name) for name in ("c_attn", "qkv_proj", "query_key_value", "wqkv") if name in attention)
    weight, heads = Weight.from_layer(fused), number_of_heads(block, size)
    width = matrix.weight.shape[1] // heads
    groups = heads if label in ("gpt2", "gpt_neox") else (weight.shape[0] // width - heads) // 2
    norm = next(getattr(block, name) for name in ("ln_1", "input_layernorm", "attention_norm") if name in block)
    kinds = [type(module) for module in (fused, follow(block, matrix.path))]
    for head, rows in enumerate(by_hand(label, heads, groups, width)):
        circuit = head_circuit(block, head, size)
        np.testing.assert_allclose(circuit.value, oracle.matrix(weight)[rows] * oracle.wide(norm.weight), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(circuit.output, oracle.matrix(matrix.weight)[:, head * width : (head + 1) * width], rtol=1e-5, atol=1e-6)
    assert [type(module) for module in (fused, follow(block, matrix.path))] == kinds  # as before they were watched


@pytest.mark.parametrize("label", ["gpt2", "phi3", "gpt_neox", "internlm2", "gpt_bigcode", "qwen", "dbrx", "openelm"])
def test_the_circuits_of_all_heads_are_the_attention_of_one_token(label, rng):
    model = InterpretableModel(build(label))
    block, size = model.source.layers[0], model.unembed.hidden_dim
    path = output_matrices(block, "attention", size)[0].path.rpartition(".")[0]
    attention, x = follow(block, path), oracle.random_array(rng, 1, 1, size, scale=0.01)  # dbrx clips large values
    found = np.zeros(size)
    for head in range(number_of_heads(block, size)):
        circuit = head_circuit(block, head, size)
        found += circuit.output @ (circuit.value / gain_of(block)) @ oracle.wide(x)[0, 0]
    expected = oracle.wide(attention(x) - attention(mx.zeros(x.shape)))[0, 0]  # without the biases
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def gain_of(block):
    gain = block_matrices._input_gain(block)
    return 1.0 if gain is None else oracle.wide(gain)


def test_values_that_are_no_rows_are_refused_by_name():
    block = InterpretableModel(build("gpt2")).source.layers[0]
    attention = block.attn

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_head, self.c_attn, self.c_proj = 4, attention.c_attn, attention.c_proj

        def __call__(self, x, mask=None, cache=None):
            return self.c_proj(self.c_attn(x)[..., : x.shape[-1]] ** 2)

    block.attn = Squared()
    with pytest.raises(InvalidValueError, match=r"attention at 'attn' can't be read: no matrix .*tried: c_attn.*Read its output matrix: 'attention'"):
        head_circuit(block, 0, block.ln_1.weight.size)


def test_an_attention_that_needs_more_than_hidden_states_is_the_cause_of_the_error():
    block = InterpretableModel(build("gpt2")).source.layers[0]
    attention = block.attn

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_head, self.c_attn, self.c_proj = 4, attention.c_attn, attention.c_proj

        def __call__(self, x, positions):
            return self.c_proj(self.c_attn(x)[..., : x.shape[-1]] + positions)

    block.attn = Positioned()
    with pytest.raises(InvalidValueError, match="no matrix of the attention .tried: c_attn") as found:
        head_circuit(block, 0, block.ln_1.weight.size)
    assert isinstance(found.value.__cause__, TypeError)
    assert "positions" in str(found.value.__cause__)
