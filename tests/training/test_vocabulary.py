"""A training step on a sample of the vocabulary, against the full vocabulary and against float64 NumPy."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates
from metalens.ops import normed
from metalens.training import CheckpointFolder, TrainingConfig, TrainingInterruptedError, guard, recipe, train_loop, vocabulary
from metalens.training import step as training_step
from metalens.training.resume import RunFacts
from metalens.training.step import accumulate, no_sums
from metalens.training.vocabulary import VocabularySampler, inclusion, sample_size, sampler_of
from support import oracle

VOCABULARY = 131  # of the tiny model
LENGTH = 16


@pytest.fixture
def ids():
    return np.random.default_rng(3).integers(0, VOCABULARY, 5 * LENGTH + 7)


@pytest.fixture
def short_pieces(monkeypatch):
    """Let 6 tokens share a sample, so that a step has several, the last of them shorter."""
    for module in (vocabulary, training_step):
        monkeypatch.setattr(module, "PIECE", 6)


@pytest.fixture
def exact_operands(monkeypatch):
    """Let the products of samples have float32 operands, so that results can be compared closely."""
    monkeypatch.setattr(training_step, "OF_SAMPLES", "float32")


def bits(lens):
    return {name: np.array(value).tobytes() for name, value in tree_flatten(lens.parameters())}


def wide(gradients):
    return np.concatenate([oracle.wide(g).ravel() for of_layer in gradients for g in of_layer.values()])


def sums_of(model, lens, batch, heads=None, done=lambda _: None):
    sums = no_sums(range(lens.num_layers))
    accumulate(sums, [parameters_of(t) for t in lens.translators], batch, model.unembed, done, heads)
    return sums


# The size


def test_the_size_of_a_sample_is_continuous_in_that_of_the_vocabulary():
    sizes = [sample_size("sampled", tokens) for tokens in range(2049, 60_000)]
    assert max(abs(np.diff(sizes))) == 1


@pytest.mark.parametrize(
    ("setting", "tokens", "size"),
    [
        ("full", 50_000, None),
        ("sampled", 49_152, 2660),
        ("sampled", 262_144, 6144),
        ("sampled", 6007, 4004),
        ("sampled", 8192, 5461),
        ("sampled", 8193, 5460),
        ("sampled", 28_672, 4060),
        ("sampled", 49_151, 2660),
        ("sampled", 2049, 2048),
        ("sampled", 2048, None),
        ("sampled", 1, None),
        (16, 17, 16),
        (131, 131, None),
        (1000, 131, None),
        (np.int32(100), 131, 100),
    ],
)
def test_the_setting_gives_the_size_of_a_sample(setting, tokens, size):
    assert sample_size(setting, tokens) == size


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("half", "vocabulary must be one of full, sampled, or a whole number, got 'half'"),
        (15, "vocabulary must be at least 16, got 15"),
        (-1, "vocabulary must be at least 16"),
        (0.5, "vocabulary can't be 0.5; it takes 'full' or 'sampled' or a whole number"),
        (True, "vocabulary can't be True"),
        (None, "vocabulary can't be None"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(vocabulary=setting)


# The probabilities


def by_bisection(w, size):
    """min(1, c w) with the sum `size`, from a c that is bracketed until it no longer moves."""
    low, high = 0.0, 2 / w.min()
    for _ in range(2000):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * w).sum() < size else (low, c)
    return np.minimum(1, low * w)


@pytest.mark.parametrize("size", [2, 16, 63, 130])
@pytest.mark.parametrize("shape", ["uniform", "one spike", "power law", "steps"])
def test_inclusion_probabilities_are_proportional_and_add_up_to_the_size(rng, size, shape):
    w = {
        "uniform": np.full(VOCABULARY, 1 / VOCABULARY) * (1 + 1e-9 * np.arange(VOCABULARY)),
        "one spike": np.r_[1e6, np.full(VOCABULARY - 1, 1e-6)],
        "power law": np.arange(1.0, VOCABULARY + 1) ** -3,
        "steps": 10.0 ** -rng.integers(0, 9, VOCABULARY),
    }[shape]
    pi = inclusion(w, size)
    assert pi.sum() == pytest.approx(size, rel=1e-12)
    assert 0 < pi.min() <= pi.max() == 1 == pi[np.argmax(w)]
    expected = by_bisection(w, size)
    if expected.max() < 1:  # the largest is 1 all the same, so that no sample is empty, and the others share the rest
        others = np.arange(VOCABULARY) != np.argmax(w)
        expected = np.where(others, 0.0, 1.0)
        expected[others] = by_bisection(w[others], size - 1)
    np.testing.assert_allclose(pi, expected, rtol=1e-9)


# The sample


@pytest.fixture
def sampler(rng):
    """A sampler of 40 of 114 tokens, behind which a head has 17 rows of padding; the text has some ids often and most never."""
    head = oracle.make_head(rng, VOCABULARY, 64, padding=17)
    return VocabularySampler(40, head, np.array([3, 3, 3, 3, 3, 9, 9, 113, 120]), seed=7)


def a_piece(rng, tokens=10, k=8):
    top = np.stack([rng.choice(114, k, replace=False) for _ in range(tokens)])
    return top, np.sort(rng.dirichlet(np.ones(k + 1), tokens)[:, :k])[:, ::-1]


def test_a_sample_is_what_its_probabilities_say(rng, sampler):
    """Over many samples every id comes as often as exp(-offset) says; padding never comes."""
    top, p = a_piece(rng)
    seen, probability, draws, sizes = np.zeros(VOCABULARY), np.full(VOCABULARY, np.nan), 3000, []
    for step in range(draws):
        ids, offset = sampler.sample(top, p, step, 0)
        assert (ids.dtype, offset.dtype) == (np.int32, np.float32)
        assert (np.diff(ids) > 0).all()
        assert 0 <= ids[0] <= ids[-1] < 114
        seen[ids] += 1
        probability[ids] = np.exp(-offset)
        sizes.append(len(ids))
    pi = probability[:114]
    assert not np.isnan(pi).any()
    assert pi.sum() == pytest.approx(40, rel=1e-5)
    assert (np.abs(seen[:114] / draws - pi) <= 5 * np.sqrt(pi * (1 - pi) / draws) + 1e-9).all()
    assert np.mean(sizes) == pytest.approx(40, abs=0.5)
    assert min(pi[3], pi[9]) > 2 * np.median(pi)  # what the text has
    assert pi[top[np.argmax(p[:, 0]), 0]] > 2 * np.median(pi)  # what the model expects
    assert pi[113] > np.median(pi) > pi.min()


def test_ids_of_the_text_that_are_padding_and_probabilities_that_are_nan_count_nothing(rng, sampler):
    top, p = a_piece(rng)
    spoiled = p.copy()
    spoiled[4] = np.nan
    a = sampler.sample(np.delete(top, 4, 0), np.delete(p, 4, 0) * 9 / 10, 0, 0)
    for x, y in zip(sampler.sample(top, spoiled, 0, 0), a, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_the_random_numbers_follow_from_the_seed_the_step_the_place_and_the_process(rng, sampler):
    top, p = a_piece(rng)

    def drawn(step=0, before=0, seed=7, rank=0):
        other = VocabularySampler(40, sampler.head, np.array([3, 9]), seed=seed, rank=rank)
        return tuple(other.sample(top, p, step, before)[0].tolist())

    assert drawn() == drawn()
    assert drawn(seed=None) == drawn(seed=0)
    different = [drawn(), drawn(step=1), drawn(before=128), drawn(seed=8), drawn(rank=1), drawn(step=128), drawn(before=1)]
    assert len(set(different)) == len(different)


def test_more_top_tokens_than_there_are(rng):
    head = oracle.make_head(rng, 5, 64, used_rows=5)
    sampler = VocabularySampler(4, head, np.array([0, 1]), seed=0)
    (found,) = sampler.heads(oracle.random_array(rng, 3, 64), 0, 0)  # one piece
    assert 1 <= found.vocab_size <= 5


def test_a_long_text_is_counted_from_all_places(monkeypatch):
    monkeypatch.setattr(vocabulary, "COUNTED", 10)
    monkeypatch.setattr(vocabulary, "BLOCK", 2)
    text = np.arange(35)
    assert vocabulary.from_all_places(text).tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 33, 34]
    assert vocabulary.from_all_places(text[:10]).tolist() == text[:10].tolist()


# The loss and its gradient


@pytest.mark.usefixtures("each_backend", "short_pieces")
@pytest.mark.parametrize(("operands", "of_loss", "of_gradient"), [("float32", 2e-5, 1e-3), ("bfloat16", 4e-3, 2e-2)])
@pytest.mark.parametrize("form", oracle.HEADS)
def test_loss_and_gradient_on_given_samples_against_float64(rng, tiny, form, operands, of_loss, of_gradient, monkeypatch):
    """For every form of head: KL(softmax(z_model - log pi) || softmax(z - log pi)) on the ids of each piece, and its gradient at the biases."""
    monkeypatch.setattr(training_step, "OF_SAMPLES", operands)
    lens, batch = oracle.random_lens(rng), tiny.source.capture(mx.array(rng.integers(0, VOCABULARY, (2, 10))))
    head = oracle.make_head(rng, VOCABULARY, 64, **oracle.HEADS[form])
    model = SimpleNamespace(unembed=SimpleNamespace(norm=tiny.unembed.norm, head=head))
    sampler, samples = VocabularySampler(40, head, np.arange(50), seed=1), []
    original = sampler.sample
    sampler.sample = lambda *args: samples.append(original(*args)) or samples[-1]
    sums = sums_of(model, lens, batch, lambda n, before: sampler.heads(n, 2, before))
    assert len(samples) == 4  # of 6, 6, 6 and 2 tokens

    w, last = oracle.matrix(head.weight), oracle.wide(normed(batch.rows(-1), tiny.unembed.norm))

    def logits(n, ids):
        z = head.scale * (n @ w[ids].T + (0 if head.bias is None else oracle.wide(head.bias)[ids]))
        z = z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)
        return z if head.offset is None else z + oracle.wide(head.offset)[ids]

    def loss(layer, bias):
        parameters = parameters_of(lens.translators[layer]) | {"bias": mx.array(bias.astype(np.float32))}
        h = oracle.wide(batch.rows(layer)) @ oracle.wide(parameters["weight"]).T + bias
        n = oracle.rms_norm(h, oracle.wide(tiny.model.model.norm.weight), tiny.model.model.norm.eps)
        total = 0.0
        for i, (ids, offset) in enumerate(samples):
            piece = slice(6 * i, 6 * i + 6)
            log_p, log_q = (oracle.log_softmax(logits(rows[piece], ids) + offset) for rows in (last, n))
            total += (np.exp(log_p) * (log_p - log_q)).sum()
        return total

    for layer in range(2):
        bias = oracle.wide(lens.translators[layer].bias)
        assert sums.losses[layer].item() == pytest.approx(loss(layer, bias), rel=of_loss)
        chosen = (0, 17, 63)
        slopes = np.array([oracle.central_difference(lambda layer=layer, bias=bias: loss(layer, bias), bias, (i,)) for i in chosen])
        found = oracle.wide(sums.gradients[layer]["bias"])
        np.testing.assert_allclose(found[list(chosen)], slopes, rtol=1e-3, atol=of_gradient * np.abs(found).max() + 1e-4)


@pytest.mark.usefixtures("short_pieces")
def test_the_mean_over_samples_is_near_the_full_loss_and_gradient(rng, tiny):
    """Each sample has about 60 of 131 ids; over 200 samples the mean loss is within 3 % of the full one, the mean gradient within 8 %."""
    lens, batch = oracle.random_lens(rng), tiny.source.capture(mx.array(rng.integers(0, VOCABULARY, (2, 10))))
    full = sums_of(tiny, lens, batch)
    sampler = VocabularySampler(60, tiny.unembed.head, np.arange(VOCABULARY), seed=0)
    samples = [sums_of(tiny, lens, batch, lambda n, before, step=step: sampler.heads(n, step, before)) for step in range(200)]
    losses, gradients = np.stack([oracle.wide(s.losses) for s in samples]), np.stack([wide(s.gradients) for s in samples])
    exact, slope = oracle.wide(full.losses), wide(full.gradients)
    assert losses.std(0).max() > 0.02 * exact[0]  # they are samples
    assert (np.abs(losses.mean(0) - exact)[:2] < 0.03 * exact[:2]).all()
    assert np.linalg.norm(gradients.mean(0) - slope) < 0.08 * np.linalg.norm(slope)
    assert np.linalg.norm(gradients[0] - slope) > 0.16 * np.linalg.norm(slope)


@pytest.mark.usefixtures("each_backend", "short_pieces")
def test_a_lens_that_is_the_model_has_no_loss_and_no_gradient_on_any_sample(rng, tiny):
    batch = tiny.source.capture(mx.array(rng.integers(0, VOCABULARY, (1, 10))))
    same = HiddenStates([batch.hidden[-1]] * 3, batch.logits)
    sampler = VocabularySampler(40, tiny.unembed.head, np.arange(VOCABULARY), seed=0)
    lens = oracle.random_lens(rng)
    for translator in lens.translators:
        translator.weight, translator.bias = mx.eye(64), mx.zeros((64,))
    sums = sums_of(tiny, lens, same, lambda n, before: sampler.heads(n, 0, before))
    assert oracle.wide(sums.losses).tolist() == [0, 0, 0]
    assert not wide(sums.gradients).any()


@pytest.mark.usefixtures("short_pieces", "exact_operands")
def test_a_sample_of_all_ids_is_the_full_loss(rng, tiny):
    lens, batch = oracle.random_lens(rng), tiny.source.capture(mx.array(rng.integers(0, VOCABULARY, (2, 10))))
    every = [tiny.unembed.head.sampled(mx.arange(VOCABULARY), mx.zeros((VOCABULARY,)))] * 4
    sums, full = sums_of(tiny, lens, batch, lambda *_: every), sums_of(tiny, lens, batch)
    np.testing.assert_allclose(oracle.wide(sums.losses), oracle.wide(full.losses), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(wide(sums.gradients), wide(full.gradients), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("short_pieces", "exact_operands")
@pytest.mark.parametrize("work", [0, 10**9])
def test_pieces_are_reported_as_they_are_done_and_their_size_changes_nothing(rng, tiny, monkeypatch, work):
    lens, batch = oracle.random_lens(rng), tiny.source.capture(mx.array(rng.integers(0, VOCABULARY, (2, 10))))
    sampler = VocabularySampler(40, tiny.unembed.head, np.arange(VOCABULARY), seed=0)
    expected = sums_of(tiny, lens, batch, lambda n, before: sampler.heads(n, 0, before))
    monkeypatch.setattr(training_step, "PIECE_WORK", work)
    monkeypatch.setattr(training_step, "LEAST_PIECE", 4)
    done, evaluations = [], []
    sums = sums_of(tiny, lens, batch, lambda n, before: sampler.heads(n, 0, before, 7, lambda: evaluations.append(1)), done.append)
    assert done == ([4, 2, 4, 2, 4, 2, 2] if work == 0 else [6, 6, 6, 2])
    assert len(evaluations) == 3  # of 7, 7 and 6 tokens
    np.testing.assert_allclose(wide(sums.gradients), wide(expected.gradients), rtol=1e-4, atol=1e-5)


# Whole runs

SETTINGS = {"num_steps": 4, "max_seq_len": LENGTH, "tokens_per_step": 2 * LENGTH, "seed": 0, "warm_start_tokens": 5 * LENGTH, "repeat": True}


@pytest.mark.parametrize("setting", ["sampled", VOCABULARY, 50_000])
def test_a_sample_as_large_as_the_vocabulary_is_the_full_vocabulary_bit_for_bit(tiny, ids, setting):
    runs = [train_loop(tiny.source, tiny.unembed, mx.array(ids), recipe("fast", **SETTINGS, vocabulary=v)) for v in (setting, "full")]
    assert bits(runs[0]) == bits(runs[1])
    assert sampler_of(recipe("fast", **SETTINGS, vocabulary=setting), tiny.unembed.head, ids, 0) is None


@pytest.mark.usefixtures("short_pieces")
def test_a_run_on_samples_is_reproducible_and_nearly_as_good(tiny, ids):
    found = {}
    for setting in ("full", 40, 100):
        losses = []
        config = recipe("muon", **SETTINGS | {"num_steps": 30, "warm_start_tokens": 0}, vocabulary=setting)
        lenses = [train_loop(tiny.source, tiny.unembed, mx.array(ids), config, callbacks=[lambda p: losses.append(p.loss)]) for _ in range(2)]  # noqa: B023
        assert bits(lenses[0]) == bits(lenses[1])
        batch = tiny.source.capture(mx.array(ids[: 5 * LENGTH].reshape(5, LENGTH)))
        found[setting] = bits(lenses[0]), mx.mean(sums_of(tiny, lenses[0], batch).losses).item() / (5 * LENGTH), losses[0]
    assert len({each[0]["translators.0.weight"] for each in found.values()}) == 3
    start, end = found["full"][2], found["full"][1]
    assert end < 0.8 * start
    assert found[100][1] < end + 0.02 * start
    assert found[40][1] < end + 0.1 * start


def test_all_layers_at_once_and_one_after_the_other_have_the_same_samples(tiny, ids):
    config = recipe("fast", **SETTINGS, vocabulary=40)
    together = train_loop(tiny.source, tiny.unembed, mx.array(ids), config)
    in_turn = train_loop(tiny.source, tiny.unembed, mx.array(ids), replace(config, layers_at_once=1))
    for (name, a), (_, b) in zip(tree_flatten(in_turn.parameters()), tree_flatten(together.parameters()), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4, err_msg=name)


def test_a_checkpoint_of_another_vocabulary_is_refused_by_its_name(tiny, ids, tmp_path):
    config = recipe("fast", **SETTINGS, vocabulary=40)
    with pytest.raises(TrainingInterruptedError):
        train_loop(tiny.source, tiny.unembed, mx.array(ids), config, checkpoints=CheckpointFolder(tmp_path), stop=lambda: True)
    for other in (41, "full", "sampled"):
        with pytest.raises(ValueError, match=f"of a run with other settings: vocabulary was 40 and is {other!r}"):
            train_loop(
                tiny.source, tiny.unembed, mx.array(ids), replace(config, vocabulary=other), checkpoints=CheckpointFolder(tmp_path), resume=True
            )


def test_a_checkpoint_of_a_version_without_the_setting_goes_on_in_full(tiny, ids, tmp_path, monkeypatch):
    config = recipe("fast", **SETTINGS, vocabulary=40)
    straight = train_loop(tiny.source, tiny.unembed, mx.array(ids), replace(config, vocabulary="full"))
    record = RunFacts.record
    with monkeypatch.context() as older:
        older.setattr(RunFacts, "record", lambda self: (found := record(self))["config"].pop("vocabulary") and found)
        with pytest.raises(TrainingInterruptedError):
            train_loop(
                tiny.source,
                tiny.unembed,
                mx.array(ids),
                replace(config, vocabulary="full"),
                checkpoints=CheckpointFolder(tmp_path),
                stop=lambda: bool(list(tmp_path.glob("step-00000000"))),
            )
    lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config, checkpoints=CheckpointFolder(tmp_path), resume=True)
    assert bits(lens) == bits(straight)
    assert bits(lens) != bits(train_loop(tiny.source, tiny.unembed, mx.array(ids), config))


def test_the_guard_reads_the_full_vocabulary(tiny, monkeypatch):
    rows, checked = [], []
    original, stats = training_step.lens_kl, guard.lens_stats
    monkeypatch.setattr(training_step, "lens_kl", lambda n, target, head: rows.append(head.vocab_size) or original(n, target, head))
    monkeypatch.setattr(guard, "lens_stats", lambda n, head, *args: checked.append(head.vocab_size) or stats(n, head, *args))
    text = mx.array(np.random.default_rng(1).integers(0, VOCABULARY, 40 * LENGTH))
    train_loop(tiny.source, tiny.unembed, text, recipe("fast", **SETTINGS | {"num_steps": 12}, vocabulary=40))
    assert set(checked) == {VOCABULARY}
    assert max(rows) < VOCABULARY
