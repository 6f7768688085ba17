"""The embedding's translator in layer transfer, marginals and their bias, against float64."""

import io

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from metalens import evaluate
from metalens.display.figures import evaluation_figure, transfer_figure
from metalens.display.tables import evaluation_table, transfer_table
from metalens.evaluation import bias
from metalens.lenses.translators import identity_linear
from metalens.models.layers import EMBEDDING
from support import oracle

LAYERS = (EMBEDDING, 0, 1, 2)


@pytest.fixture
def lens(rng):
    found = oracle.random_lens(rng)
    found.embedding_translator = identity_linear(64)
    found.embedding_translator.weight = mx.eye(64) + oracle.random_array(rng, 64, 64, scale=0.05)
    found.embedding_translator.bias = oracle.random_array(rng, 64, scale=0.1)
    return found


@pytest.fixture
def sequences(rng):
    return [rng.integers(0, 131, size).tolist() for size in (8, 5, 7)]


@pytest.fixture
def result(tiny, lens, sequences):
    return evaluate(tiny, sequences, lens, max_seq_len=8, embedding=True, layer_transfer=True, logit_stats=True)


def logits(model, lens, ids):
    """The model's logits [T, V], and {(translator, layer): logits [T, V]} with None for no translator, in float64."""
    unembedding = oracle.Unembedding(model.unembed)
    captured = model.source.capture(mx.array([ids]), with_embedding=True)
    hidden = {layer: oracle.wide(captured.embedding if layer == EMBEDDING else captured.hidden[layer])[0] for layer in LAYERS}
    dense = {layer: [oracle.wide(part) for part in lens.dense(layer)] for layer in LAYERS}
    found = {(i, j): unembedding.translated(hidden[j], *dense[i]) for i in LAYERS for j in LAYERS}
    return unembedding.logits(hidden[2]), found | {(None, j): unembedding.logits(hidden[j]) for j in LAYERS}


def test_transfer_against_float64(tiny, lens, sequences, result):
    ce, kl, kl_model = np.zeros((3, 4, 4))
    positions, labels = sum(map(len, sequences)), sum(map(len, sequences)) - len(sequences)
    for ids in sequences:
        z_model, z = logits(tiny, lens, ids)
        for a, i in enumerate(LAYERS):
            for b, j in enumerate(LAYERS):
                ce[a, b] -= oracle.log_softmax(z[i, j])[range(len(ids) - 1), ids[1:]].sum() / labels
                kl[a, b] += oracle.kl(z[j, j], z[i, j]).sum() / positions
                kl_model[a, b] += oracle.kl(z_model, z[i, j]).sum() / positions
    assert result.transfer.layers == LAYERS
    for ours, expected in ((result.transfer.ce, ce), (result.transfer.kl, kl), (result.transfer.kl_model, kl_model)):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert result.transfer.ce[0][0] == pytest.approx(result.embedding["tuned"].ce, rel=1e-6)


def test_marginals_and_bias_against_float64(tiny, lens, sequences, result):
    sums = {name: np.zeros(131) for name in ("model", "logit", "tuned")}
    for ids in sequences:
        z_model, z = logits(tiny, lens, ids)
        for name, each in (("model", z_model), ("logit", z[None, EMBEDDING]), ("tuned", z[EMBEDDING, EMBEDDING])):
            sums[name] += oracle.softmax(each).sum(axis=0) / sum(map(len, sequences))
    for name in ("logit", "tuned"):
        key = f"{name} embedding"
        np.testing.assert_allclose(result.logit_stats[key].marginal_probs[0], sums[name], atol=1e-7)
        expected = (sums["model"] * np.log(sums["model"] / sums[name])).sum()
        assert result.bias[key] == [pytest.approx(expected, rel=1e-4)]
        assert result.bias[key] == bias(result.logit_stats["model"], result.logit_stats[key])
        assert result.to_dict()["embedding"][name]["bias"] == result.bias[key][0]


def test_it_is_shown_and_written(result):
    upstream = result.to_upstream()["tuned"]
    names = ["layer_0", "layer_1", "layer_2", "layer_3"]
    assert list(upstream["kl"]) == list(upstream["layer_transfer"]["ce"]) == list(upstream["layer_transfer"]["ce"]["layer_0"]) == names
    assert upstream["layer_transfer"]["kl"]["layer_0"]["layer_3"] == pytest.approx(result.transfer.kl[0][3] * result.nats_to_bpb)
    assert result.to_dict()["transfer"]["layers"] == list(LAYERS)
    stream = io.StringIO()
    for table in (evaluation_table(result), transfer_table(result.transfer, 3)):
        Console(file=stream, width=250).print(table)
    assert stream.getvalue().count("embedding") == 3  # a row of each, a column of one
    assert f"{result.bias['tuned embedding'][0]:.3f}" in stream.getvalue()
    assert "that the lens translates" not in stream.getvalue()
    axes = transfer_figure(result.transfer, "t", 3).axes[0]
    axes.figure.canvas.draw()
    assert "emb." in [label.get_text() for label in axes.get_yticklabels()]
    curves = evaluation_figure(result)
    curves.canvas.draw()
    assert curves.axes[-1].lines[1].get_xdata().tolist() == [-1, 0, 1, 2]
    assert curves.axes[-1].lines[1].get_ydata()[0] == result.bias["tuned embedding"][0]
    assert "emb." in [label.get_text() for label in curves.axes[0].get_xticklabels()]
