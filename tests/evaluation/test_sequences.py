"""Values of every sequence, standard errors, and the embedding, against float64."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from metalens import TunedLens, evaluate
from metalens.display.tables import evaluation_table
from metalens.evaluation import write_results
from metalens.models.layers import EMBEDDING
from metalens.utils.errors import MetalensError
from support import oracle

LENGTH = 8


@pytest.fixture
def lens(rng):
    found = oracle.random_lens(rng)
    found.embedding_translator = TunedLens(1, 64).translators[0]
    found.embedding_translator.weight = mx.eye(64) + oracle.random_array(rng, 64, 64, scale=0.05)
    return found


@pytest.fixture
def sequences(rng):
    return [rng.integers(0, 131, size).tolist() for size in (8, 8, 5, 8, 3)]


@pytest.fixture
def result(tiny, lens, sequences):
    return evaluate(tiny, sequences, lens, max_seq_len=LENGTH, embedding=True)


def kl_and_ce(model, lens, ids, layer):
    """Of every position, in float64."""
    unembedding = oracle.Unembedding(model.unembed)
    states = model.source.capture(mx.array([ids]), with_embedding=True)
    h = oracle.wide(states.embedding if layer == EMBEDDING else states.hidden[layer])[0]
    weight, bias = (oracle.wide(part) for part in lens.dense(layer))
    z, z_model = unembedding.translated(h, weight, bias), unembedding.logits(oracle.wide(states.hidden[-1])[0])
    return oracle.kl(z_model, z), -np.take_along_axis(oracle.log_softmax(z)[:-1], np.array(ids[1:])[:, None], axis=-1)[:, 0]


def jackknife(sums, counts):
    """The standard error of sum(sums) / sum(counts) by leaving out one sequence at a time: close to the formula, but not the same."""
    n = len(sums)
    left_out = np.array([(sums.sum() - s) / (counts.sum() - c) for s, c in zip(sums, counts, strict=True)])
    return math.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())


@pytest.mark.parametrize(("layer", "column"), [(0, ("tuned", 0)), (1, ("tuned", 1)), (EMBEDDING, ("tuned embedding", 0))])
def test_against_float64(tiny, lens, sequences, result, layer, column):
    name, index = column
    found = [kl_and_ce(tiny, lens, ids, layer) for ids in sequences]
    for which, score in enumerate(("kl", "ce")):
        values = [pair[which] for pair in found]
        counts, sums = np.array([len(v) for v in values]), np.array([v.sum() for v in values])
        np.testing.assert_allclose(result.sequences.means(name, score)[:, index], sums / counts, atol=1e-4)
        residuals = sums - sums.sum() / counts.sum() * counts
        expected = math.sqrt(len(sums) / (len(sums) - 1) * (residuals**2).sum()) / counts.sum()
        error = result.standard_errors(name, score)[index]
        assert error == pytest.approx(expected, rel=1e-3)
        assert error == pytest.approx(jackknife(sums, counts), rel=0.3)
    scores = result.embedding["tuned"] if layer == EMBEDDING else result.tuned[layer]
    assert scores.kl == pytest.approx(np.concatenate([kl for kl, _ in found]).mean(), abs=1e-5)
    assert scores.ce == pytest.approx(np.concatenate([ce for _, ce in found]).mean(), abs=1e-5)


def test_the_embedding_of_the_logit_lens_and_of_a_lens_without_a_translator(tiny, sequences, rng):
    plain = oracle.random_lens(rng)
    result = evaluate(tiny, sequences, plain, max_seq_len=LENGTH, embedding=True)
    assert result.embedding["tuned"] == result.embedding["logit"]
    kl = np.concatenate([kl_and_ce(tiny, TunedLens(3, 64), ids, EMBEDDING)[0] for ids in sequences])
    assert result.embedding["logit"].kl == pytest.approx(kl.mean(), abs=1e-5)
    assert evaluate(tiny, sequences, plain, max_seq_len=LENGTH).embedding is None


def test_the_numbers_in_json_and_in_upstream_s_names(result, tmp_path):
    data = json.loads(json.dumps(result.to_dict()))
    assert data["sequences"] == 5
    assert data["embedding"].keys() == {"logit", "tuned"}
    assert data["standard_errors"].keys() == {"model", "logit", "tuned", "logit embedding", "tuned embedding"}
    assert data["standard_errors"]["tuned"]["kl"] == result.standard_errors("tuned", "kl")
    upstream = result.to_upstream()
    assert list(upstream["tuned"]["ce"]) == ["layer_0", "layer_1", "layer_2", "layer_3"]
    assert upstream["logit"]["kl"]["layer_0"] == result.embedding["logit"].kl_bits_per_byte
    written = write_results(result, tmp_path)
    assert [path.name for path in written] == ["evaluation.json", "aggregate_metrics.json", "batches.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [8, 8, 5, 8, 3]
    assert lines[2]["tuned"]["kl"]["layer_2"] == pytest.approx(result.sequences.means("tuned", "kl")[2, 1] * result.nats_to_bpb)
    weighted = sum(line["tokens"] * line["logit"]["kl"]["layer_0"] for line in lines) / result.tokens
    assert weighted == pytest.approx(result.embedding["logit"].kl_bits_per_byte)
    assert lines[0]["baseline"].keys() == {"ce", "entropy"}
    write_results(result, tmp_path)  # its own files may be replaced
    for theirs in ("someone's", '{"tokens": [1, 2, 3]}\n'):  # the latter is a usual form of a training set
        (tmp_path / "batches.jsonl").write_text(theirs)
        with pytest.raises(MetalensError, match="batches.jsonl exists"):
            write_results(result, tmp_path)


def test_a_single_sequence_has_no_error(tiny, lens):
    result = evaluate(tiny, [1, 2, 3], lens)
    assert result.standard_errors("tuned", "kl") is None
    assert "standard_errors" not in result.to_dict()


def test_a_sequence_without_a_next_token(tiny, lens):
    result = evaluate(tiny, [[1, 2, 3], [4], [5, 6]], lens)
    assert np.isnan(result.sequences.means("tuned", "ce")[1]).all()
    assert result.sequences.to_upstream(1.0)[1]["tuned"]["ce"]["layer_1"] is None
    assert all(map(math.isfinite, result.standard_errors("tuned", "ce")))


def test_they_are_shown(result):
    import io

    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=250).print(evaluation_table(result))
    shown = stream.getvalue()
    assert f"{result.tuned[0].kl:.3f} ±{result.standard_errors('tuned', 'kl')[0]:.3f}" in shown
    assert "embedding" in shown
    assert "standard error" in shown
    assert repr(result).splitlines()[2].split()[:2] == ["embed.", f"{result.embedding['logit'].kl:.3f}"]
