"""Layer transfer, marginals and their bias, and the files of an evaluation, against plain float64."""

import io
import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from metalens import InterpretableModel, TunedLens, evaluate
from metalens.display.figures import transfer_figure
from metalens.display.tables import evaluation_table
from metalens.evaluation import Evaluation, LogitStats, Scores, bias, dirichlet, marginals, write_results
from metalens.evaluation.marginals import LogitSums
from metalens.readings.heat_map import save_figure
from support import oracle
from support.full_disk import largest_file

LENGTH = 8
CUTS = [8, 8, 9, 1, 2]  # a tail of one token that joins its neighbor, a document of one token, the shortest that predicts


@pytest.fixture
def documents(rng):
    ids = rng.integers(0, 131, sum(CUTS)).tolist()
    return [ids[:25], ids[25:26], ids[26:]]


def streams(model, documents):
    """(hidden [L, T, D] float64, ids [T]) of every sequence."""
    ids = np.concatenate(documents)
    for end, cut in zip(np.cumsum(CUTS), CUTS, strict=True):
        sequence = ids[end - cut : end]
        hidden = model.source.capture(mx.array(sequence)[None]).hidden
        yield np.stack([oracle.wide(h)[0] for h in hidden]), sequence


def translate(unembedding, h, translator):
    return unembedding.translated(h, oracle.wide(translator.weight), oracle.wide(translator.bias))


@pytest.mark.usefixtures("each_backend")
def test_layer_transfer_against_float64(rng, quantized_model, documents):
    lens, unembedding = oracle.random_lens(rng), oracle.Unembedding(quantized_model.unembed)
    ce, kl, kl_model = ([[[] for _ in range(3)] for _ in range(3)] for _ in range(3))
    for hidden, ids in streams(quantized_model, documents):
        z_model = unembedding.logits(hidden[-1])
        for j in range(3):
            own = translate(unembedding, hidden[j], lens.translators[j])
            for i in range(3):
                z = translate(unembedding, hidden[j], lens.translators[i])
                ce[i][j] += (-oracle.log_softmax(z)[range(len(ids) - 1), ids[1:]]).tolist()
                kl[i][j] += oracle.kl(own, z).tolist()
                kl_model[i][j] += oracle.kl(z_model, z).tolist()
    result = evaluate(quantized_model, documents, lens, max_seq_len=LENGTH, layer_transfer=True)
    for ours, expected in ((result.transfer.ce, ce), (result.transfer.kl, kl), (result.transfer.kl_model, kl_model)):
        np.testing.assert_allclose(ours, np.mean(expected, axis=-1), rtol=1e-5, atol=1e-6)
    assert np.diag(result.transfer.kl).tolist() == [0, 0, 0]
    np.testing.assert_allclose(np.diag(result.transfer.ce), [s.ce for s in result.tuned], rtol=1e-6)
    np.testing.assert_allclose(np.diag(result.transfer.kl_model), [s.kl for s in result.tuned], rtol=1e-6)
    np.testing.assert_allclose(result.transfer.penalty, np.array(result.transfer.ce) - np.diag(result.transfer.ce), atol=1e-12)
    assert min(abs(result.transfer.ce[i][j] - result.transfer.ce[j][i]) for i in range(3) for j in range(i)) > 1e-3  # transposing would show


def test_layer_transfer_needs_a_lens(tiny):
    with pytest.raises(ValueError, match="layer_transfer needs a tuned lens"):
        evaluate(tiny, [1, 2, 3], layer_transfer=True)


def test_layer_transfer_of_a_function(rng, tiny, documents):
    lens = oracle.random_lens(rng)
    ours, expected = (evaluate(tiny, documents, each, layer_transfer=True).transfer for each in (lens.__call__, lens))
    np.testing.assert_allclose(ours.kl_model, expected.kl_model, atol=1e-5)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_marginals_and_bias_against_float64(rng, monkeypatch, quantized_model, documents, rows):
    monkeypatch.setattr(marginals, "ROWS", rows)
    lens, unembedding = oracle.random_lens(rng), oracle.Unembedding(quantized_model.unembed)
    parts = {"model": [], "logit": [], "tuned": []}
    for hidden, _ in streams(quantized_model, documents):
        parts["model"].append(unembedding.logits(hidden[-1])[None])
        parts["logit"].append(unembedding.logits(hidden))
        parts["tuned"].append(np.stack([translate(unembedding, h, t) for h, t in zip(hidden, lens.translators, strict=True)]))
    logs = {name: oracle.log_softmax(np.concatenate(z, axis=1)) for name, z in parts.items()}
    result = evaluate(quantized_model, documents, lens, max_seq_len=LENGTH, logit_stats=True)
    assert result.logit_stats.keys() == logs.keys()
    for name, log_q in logs.items():
        stats = result.logit_stats[name]
        assert (stats.n, stats.marginal_probs.shape) == (sum(CUTS), (len(log_q), 131))
        np.testing.assert_allclose(stats.marginal_probs, np.exp(log_q).mean(axis=1), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(stats.sufficient_stats, log_q.mean(axis=1), rtol=1e-5)
    for name in ("logit", "tuned"):
        p, q = np.exp(logs["model"]).mean(axis=1), np.exp(logs[name]).mean(axis=1)
        np.testing.assert_allclose(result.bias[name], np.sum(p * np.log(p / q), axis=1), rtol=1e-4, atol=1e-7)
    assert result.bias["logit"][-1] == pytest.approx(0, abs=1e-7)
    # Averaging before comparing can only lose: KL is convex.
    assert all(b <= s.kl for b, s in zip(result.bias["tuned"], result.tuned, strict=True))
    without = evaluate(quantized_model, documents, max_seq_len=LENGTH, logit_stats=True)
    assert without.bias == {"logit": result.bias["logit"]}


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", oracle.HEADS)
def test_marginals_of_every_head(rng, name):
    head = oracle.make_head(rng, 67, 32, **oracle.HEADS[name])
    rows = [oracle.random_array(rng, 2, n, 32) for n in (300, 1)]  # more than a chunk has, and one alone
    sums = LogitSums(2, head)
    for each in rows:
        sums.add(each)
    log_q = oracle.log_softmax(oracle.head_logits(np.concatenate([oracle.wide(r) for r in rows], axis=1), head))[..., : head.tokens]
    found = sums.means()
    assert found.n == 301
    np.testing.assert_allclose(found.marginal_probs, np.exp(log_q).mean(axis=1), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.sufficient_stats, log_q.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.marginal_probs.sum(axis=1), 1, rtol=1e-6)


def test_many_rows_lose_nothing(rng):
    # 20000 equal rows: in float32 the roundings of one sum would all point one way.
    head = oracle.make_head(rng, 67, 32)
    row = oracle.random_array(rng, 1, 1, 32)
    sums = LogitSums(1, head)
    sums.add(mx.broadcast_to(row, (1, 20000, 32)))
    log_q = oracle.log_softmax(oracle.head_logits(oracle.wide(row)[0, 0], head))
    np.testing.assert_allclose(sums.means().marginal_probs[0], np.exp(log_q), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(sums.means().sufficient_stats[0], log_q, rtol=1e-6)


def test_bias_of_what_hardly_happens():
    def stats(*rows):
        return LogitStats(1, np.array(rows), np.zeros((len(rows), 3)))

    model = stats([0.5, 0.5, 0.0])
    assert bias(model, stats([0.5, 0.5, 0.0], [0.25, 0.25, 0.5])) == pytest.approx([0.0, math.log(2)])
    # 0 is what float32 makes of a small probability; the bias is large and finite, as JSON needs it.
    assert bias(model, stats([0.5, 0.0, 0.5])) == pytest.approx([0.5 * (math.log(0.5) + 149 * math.log(2))])


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_the_most_likely_dirichlet_distribution(rng, scale):
    a = scale * (0.05 + rng.gamma(0.5, 1, 40))
    # Samples by their logarithms: small concentrations have probabilities that float64 would round to 0.
    gammas = np.log(rng.gamma(a + 1, 1, (4000, 40))) + np.log(rng.random((4000, 40))) / a
    s = np.mean(gammas - np.logaddexp.reduce(gammas, axis=1, keepdims=True), axis=0)
    found = LogitStats(4000, np.full((1, 40), 1 / 40), s[None]).mle(0)
    np.testing.assert_allclose(found, a, rtol=0.15)

    def likelihood(a):
        return math.lgamma(a.sum()) - sum(map(math.lgamma, a)) + (a - 1) @ s

    # Concave: where no small step in any direction leads up, it is the top.
    best = likelihood(found)
    for k in range(40):
        for factor in (0.99, 1.01):
            moved = found.copy()
            moved[k] *= factor
            assert likelihood(moved) < best


def test_equal_predictions_come_from_no_dirichlet_distribution():
    with pytest.raises(ValueError, match="more tokens"):
        LogitStats(1, np.full((1, 4), 0.25), np.log(np.full((1, 4), 0.25))).mle(0)


def test_special_functions():
    x = np.concatenate([10.0 ** np.arange(-6, 6), [7.5, 8.0, 8.5]])
    np.testing.assert_allclose(dirichlet.digamma(x + 1) - 1 / x, dirichlet.digamma(x), rtol=1e-12)
    np.testing.assert_allclose(dirichlet.trigamma(x + 1) + 1 / x**2, dirichlet.trigamma(x), rtol=1e-12)
    np.testing.assert_allclose(dirichlet.inverse_digamma(dirichlet.digamma(x)), x, rtol=1e-9)
    assert dirichlet.digamma(np.array(1.0)) == pytest.approx(-0.5772156649015329, rel=1e-12)
    assert dirichlet.trigamma(np.array(1.0)) == pytest.approx(math.pi**2 / 6, rel=1e-12)
    assert dirichlet.digamma(np.array(0.5)) == pytest.approx(-0.5772156649015329 - 2 * math.log(2), rel=1e-12)
    assert dirichlet.trigamma(np.array(0.5)) == pytest.approx(math.pi**2 / 2, rel=1e-12)


# ------------------------------------------------------------------ files and tables


@pytest.fixture
def everything(rng, tiny, documents):
    return evaluate(tiny, documents, oracle.random_lens(rng), max_seq_len=LENGTH, layer_transfer=True, logit_stats=True, bytes_per_token=3.0)


def test_the_dictionary(everything):
    data = json.loads(json.dumps(everything.to_dict(), allow_nan=False))
    assert data.keys() == {"tokens", "bytes_per_token", "token_shift", "model", "layers", "transfer", "sequences", "standard_errors"}
    matrices = {"ce": everything.transfer.ce, "kl": everything.transfer.kl, "kl_model": everything.transfer.kl_model}
    assert data["transfer"] == matrices | {"layers": [0, 1, 2]}
    for name in ("logit", "tuned"):
        assert data["layers"][1][name]["bias"] == everything.bias[name][1]
        assert data["layers"][1][name]["bias_bits"] == pytest.approx(everything.bias[name][1] / math.log(2))
    assert "bias" not in data["model"]


def test_upstream_s_names_and_units(everything):
    data = everything.to_upstream()
    ratio = 1 / 3 / math.log(2)
    assert data.keys() == {"baseline", "logit", "tuned"}
    assert data["baseline"]["ce"] == {"final": everything.model.bits_per_byte}
    assert data["baseline"]["entropy"] == {"final": pytest.approx(everything.model.entropy * ratio)}
    assert data["logit"].keys() == {"ce", "entropy", "kl"}
    assert data["tuned"].keys() == {"ce", "entropy", "kl", "layer_transfer"}
    # The output of block 0 is the input of block 1, which upstream calls layer_1.
    assert list(data["tuned"]["kl"]) == ["layer_1", "layer_2", "layer_3"]
    assert data["tuned"]["kl"]["layer_2"] == pytest.approx(everything.tuned[1].kl * ratio)
    assert data["tuned"]["layer_transfer"]["kl"]["layer_1"]["layer_3"] == pytest.approx(everything.transfer.kl[0][2] * ratio)


def test_files(everything, tmp_path):
    folder = tmp_path / "new" / "results"
    files = write_results(everything, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["aggregate_metrics.json", "batches.jsonl", "evaluation.json", "logit_stats.npz"]
    assert sorted(files) == sorted(folder.iterdir())
    assert json.loads((folder / "evaluation.json").read_text()) == everything.to_dict()
    assert json.loads((folder / "aggregate_metrics.json").read_text()) == everything.to_upstream()
    with np.load(folder / "logit_stats.npz") as stored:
        assert stored["n"] == everything.tokens
        assert stored["tuned_layers"].tolist() == [0, 1, 2]
        for name, stats in everything.logit_stats.items():
            np.testing.assert_allclose(stored[f"{name}_marginal_probs"], stats.marginal_probs, rtol=1e-6)
            np.testing.assert_allclose(stored[f"{name}_sufficient_stats"], stats.sufficient_stats, rtol=1e-6)


def test_files_of_the_logit_lens_alone(tiny, tmp_path):
    result = evaluate(tiny, [1, 2, 3])
    assert [p.name for p in write_results(result, tmp_path)] == ["evaluation.json", "aggregate_metrics.json", "batches.jsonl"]
    assert json.loads((tmp_path / "aggregate_metrics.json").read_text()).keys() == {"baseline", "logit"}


def test_a_full_disk_leaves_the_earlier_evaluation(everything, tiny, tmp_path):
    """All of it: a new evaluation.json beside old statistics would be two evaluations in one folder."""
    write_results(replace(everything, tokens=7), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    largest = max(map(len, before.values()))
    with pytest.raises(OSError, match=r"logit_stats\.npz"), largest_file(largest - 1):
        write_results(everything, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(before["logit_stats.npz"]) == largest


def test_nothing_half_written(tmp_path):
    broken = Evaluation(2, 1.0, *[Scores(*[math.nan] * 7)], [], None)
    with pytest.raises(ValueError, match="JSON"):
        write_results(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


def printed(table):
    console = Console(width=250, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table(everything, tiny):
    plain = printed(evaluation_table(evaluate(tiny, [1, 2, 3])))
    assert "KL(model || lens) and cross-entropy in nats per token" in " ".join(plain.split())
    assert "entropy │" not in plain
    full = printed(evaluation_table(everything, entropy=True))
    assert "KL(model || lens), cross-entropy, entropy and bias in nats per token" in full
    row = next(line for line in full.splitlines() if line.strip("│ ").startswith("1 "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    logit, tuned = everything.logit[1], everything.tuned[1]
    errors = everything.standard_errors("logit", "kl")
    assert cells[1] == f"{logit.kl:.3f}" + (f" ±{errors[1]:.3f}" if errors else "")
    assert cells[4:7] == [f"{100 * logit.top1:.1f} %", f"{logit.entropy:.3f}", f"{everything.bias['logit'][1]:.3f}"]
    assert cells[11:] == [f"{tuned.entropy:.3f}", f"{everything.bias['tuned'][1]:.3f}"]
    model = next(line for line in full.splitlines() if "model" in line and "KL" not in line)
    assert f"{everything.model.entropy:.3f}" in model


def test_the_picture_of_layer_transfer(everything, tmp_path):
    figure = transfer_figure(everything.transfer, "title")
    image = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(image, everything.transfer.penalty)
    save_figure(figure, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 1000


def test_one_layer(rng, make_llama):
    model = InterpretableModel(make_llama(layers=1))
    result = evaluate(model, [1, 2, 3], TunedLens(1, 64), layer_transfer=True, logit_stats=True)
    assert result.transfer.kl == [[0.0]]
    assert transfer_figure(result.transfer) is not None
