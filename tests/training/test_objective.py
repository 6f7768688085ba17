"""The losses: cross-entropy and shifted positions, against float64 and upstream's rule (drop the ends, then the mean over what is left)."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens, evaluate
from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates
from metalens.training import Corpus, Sampler, TrainingConfig, recipe, train_loop
from metalens.training.batching import BatchedCapture
from metalens.training.data import Step
from metalens.training.guard import held_back_loss, message
from metalens.training.objective import Objective
from metalens.training.settings import resolve
from metalens.training.step import accumulate, no_sums
from support import oracle

LENGTH = 10


@pytest.fixture
def ids(rng):
    """Five sequences and a shorter one, so that a step has ends within it."""
    return rng.integers(0, 131, 5 * LENGTH + 3)


def expected(model, lens, sequences, loss, shift):
    """Per layer the mean loss over all pairs, in float64."""
    unembedding = oracle.Unembedding(model.unembed)
    found = [[] for _ in lens.translators]
    for s in sequences:
        hidden = [oracle.wide(h)[0] for h in model.source.capture(mx.array(s[None])).hidden]
        z_model = unembedding.logits(hidden[-1])
        at = [t for t in range(len(s)) if 0 <= t + shift < len(s)]
        for losses, h, translator in zip(found, hidden, lens.translators, strict=True):
            z = unembedding.translated(h, oracle.wide(translator.weight), oracle.wide(translator.bias))
            for t in at:
                losses.append(oracle.kl(z_model[t + shift], z[t]) if loss == "kl" else -oracle.log_softmax(z[t])[s[t + shift]])
    return [np.mean(losses) for losses in found]


CASES = [("kl", 1), ("kl", -2), ("ce", None), ("ce", 2), ("ce", -1), ("ce", 0)]


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize(("loss", "shift"), CASES)
def test_the_loss_and_its_gradient(tiny, rng, ids, loss, shift):
    start, seen = oracle.random_lens(rng), []
    settings = {"num_steps": 1, "momentum": 0.0, "gradient_clip": 1e9, "learning_rate": 1.0, "reduction": "sum", "loss": loss, "token_shift": shift}
    config = TrainingConfig(max_seq_len=LENGTH, tokens_per_step=len(ids) // LENGTH * LENGTH + LENGTH, **settings)
    sequences = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    sequences.append(sequences[0])  # the step is larger than the text, which begins anew
    lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config, start=start, callbacks=[seen.append])
    shift = config.shift
    assert shift == (1 if config.token_shift is None else config.token_shift)
    assert seen[0].losses == pytest.approx(expected(tiny, start, sequences, loss, shift), abs=2e-5)
    # A directional derivative of every layer along its own step.
    for layer in (0, 1):
        step = [oracle.wide(getattr(start.translators[layer], n)) - oracle.wide(getattr(lens.translators[layer], n)) for n in ("weight", "bias")]
        squares = sum(float((part**2).sum()) for part in step)
        size, found = 1e-3 / squares**0.5, []
        for sign in (1, -1):
            moved = oracle.random_lens(np.random.default_rng(0))
            for other, own in zip(moved.translators, start.translators, strict=True):
                other.weight, other.bias = own.weight, own.bias
            for name, part in zip(("weight", "bias"), step, strict=True):
                value = oracle.wide(getattr(start.translators[layer], name)) + sign * size * part
                setattr(moved.translators[layer], name, mx.array(value.astype(np.float32)))
            found.append(expected(tiny, moved, sequences, loss, shift)[layer])
        assert (found[0] - found[1]) / (2 * size) == pytest.approx(squares, rel=2e-3)


def test_training_on_cross_entropy_lowers_it(make_llama, rng):
    """Below the model's own: the random model predicts a repeated text badly."""
    model, ids = InterpretableModel(make_llama()), np.tile(rng.integers(0, 131, 16), 8)
    config = recipe("adam", num_steps=60, max_seq_len=32, tokens_per_step=64, learning_rate=0.02, loss="ce", embedding=False, guard_tokens=0)
    lens = train_loop(model.source, model.unembed, mx.array(ids), config)
    found = evaluate(model, ids.tolist(), lens, max_seq_len=32)
    assert all(scores.ce < 0.5 * found.model.ce for scores in found.tuned)


def test_only_the_tokens_that_count(tiny, rng):
    """With a mask, a position takes part if it counts, whether or not its partner does."""
    ids, counted = rng.integers(0, 131, 2 * LENGTH), np.zeros(2 * LENGTH, bool)
    counted[[2, 3, 7, 9, 15]] = True
    corpus = Corpus.from_ids(ids, answers=counted)
    config = TrainingConfig(1, LENGTH, learning_rate=1.0, loss="ce", loss_on="answers", reduction="sum")
    seen = []
    train_loop(tiny.source, tiny.unembed, corpus, config, callbacks=[seen.append])
    step = Sampler(corpus, LENGTH, repeat=True).take_step(config.step_tokens)
    losses = []
    for s, counts in zip(step.sequences, step.counted, strict=True):
        hidden = oracle.wide(tiny.source.capture(mx.array(s[None])).hidden[0])[0]
        log_q = oracle.log_softmax(oracle.Unembedding(tiny.unembed).logits(hidden))
        losses += [-log_q[t, s[t + 1]] for t in range(len(s) - 1) if counts[t]]
    assert len(losses) > 3
    assert seen[0].losses[0] == pytest.approx(np.mean(losses), abs=1e-5)


def test_pairs():
    h = mx.zeros((2, 4, 3))
    batch = HiddenStates([h], mx.zeros((2, 4, 0)), ids=mx.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    assert Objective("kl", 0).pairs(batch) == (None, None)
    at, to = Objective("ce", 1).pairs(batch)
    assert (at.tolist(), to.tolist()) == ([0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 7])
    assert Objective("ce", 1).labels(batch, to).tolist() == [2, 3, 4, 6, 7, 8]
    at, to = Objective("kl", -3).pairs(batch)
    assert (at.tolist(), to.tolist()) == ([3, 7], [0, 4])
    assert Objective("kl", 4).pairs(batch)[0].size == 0
    with pytest.raises(ValueError, match="needs the token ids"):
        Objective("ce", 1).labels(HiddenStates([h], h), to)


def test_a_batch_in_which_no_token_has_a_partner(tiny):
    batch, sums = tiny.source.capture(mx.array([[5, 6]])), no_sums([0])
    accumulate(sums, [parameters_of(TunedLens(3, 64).translators[0])], batch, tiny.unembed, objective=Objective("kl", 3))
    assert (sums.tokens, sums.gradients, sums.losses.tolist()) == (0, [], [0.0])


@pytest.mark.parametrize(("loss", "shift"), [("ce", 1), ("kl", 2)])
def test_the_guard_checks_the_loss_of_the_run(tiny, rng, ids, loss, shift):
    lens, sequences = oracle.random_lens(rng), [ids[:LENGTH].astype(np.int32), ids[LENGTH : 2 * LENGTH].astype(np.int32), ids[:1].astype(np.int32)]
    text = Step(sequences, 2 * LENGTH + 1, {})
    parameters = [parameters_of(translator) for translator in lens.translators]
    capture = BatchedCapture(tiny.source, 131)
    *sums, tokens = held_back_loss(parameters, range(3), text, capture, tiny.unembed, objective=Objective(loss, shift)).tolist()
    assert tokens == 2 * (LENGTH - shift)
    np.testing.assert_allclose(np.array(sums) / tokens, expected(tiny, lens, sequences, loss, shift), atol=2e-5)
    assert message([0], {0: 2.0}, {0: 1.0}, 3, False, "CE").startswith(
        "After step 3 the text that is held back is predicted worse than before by layer 0 (CE "
    )


@pytest.mark.parametrize("shift", [20, -20, 1, -1])
def test_what_is_held_back_has_partners(tiny, rng, shift):
    """Also if the shift is longer than the 16 tokens that a sequence is cut to."""
    corpus = Corpus.from_ids(rng.integers(0, 131, 40 * 32))
    held = Sampler(corpus, 32, held_back=32, shift=shift).held_back_step()
    kept = min(16, 32 - abs(shift))  # of each of two sequences
    assert held.tokens == 2 * kept
    assert [s.size for s in held.sequences] == [kept + abs(shift)] * 2
    identity = [parameters_of(TunedLens(3, 64).translators[0])]
    found = held_back_loss(identity, [0], held, BatchedCapture(tiny.source, 131), tiny.unembed, objective=Objective("kl", shift))
    assert found[-1].item() == held.tokens
    train_loop(tiny.source, tiny.unembed, corpus, TrainingConfig(2, 32, tokens_per_step=256, token_shift=shift, guard_tokens=32))


@pytest.mark.parametrize("shift", [1, 3])
def test_what_is_held_back_has_the_partner_of_its_last_token(rng, shift):
    """Only token 7 of each sequence counts: its partner is behind it. What counts in front of the end has none."""
    for counted, tokens in ((7, 2), (31, 0)):
        mask = np.tile(np.arange(32) == counted, 40)
        held = Sampler(Corpus.from_ids(rng.integers(0, 131, mask.size), answers=np.roll(mask, 1)), 32, held_back=32, shift=shift).held_back_step()
        assert held.tokens == tokens
        assert [s.size for s in held.sequences] == [counted + 1 + shift] * tokens
        assert [np.flatnonzero(m).tolist() for m in held.counted] == [[counted]] * tokens


def test_a_run_of_which_no_held_back_token_has_a_partner_has_no_guard(tiny, rng):
    """Only the last token of each sequence counts, and its partner would be behind the end."""
    answers = np.arange(40 * LENGTH) % LENGTH == 0  # the token behind it, which is the next sequence's first
    corpus = Corpus.from_ids(rng.integers(0, 131, answers.size), answers=answers)
    config = TrainingConfig(1, LENGTH, tokens_per_step=26 * LENGTH, loss="ce", loss_on="answers", guard_tokens=24)
    assert Sampler(corpus, LENGTH, held_back=config.held_back_tokens).held_back_step().tokens > 0
    seen = []
    train_loop(tiny.source, tiny.unembed, corpus, config, callbacks=[seen.append])
    assert seen[0].losses == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ce", "step_size": "loss", "optimizer": "muon"}, "loss 'ce' needs step_size 'rate'.*recipe paper, adam or muon"),
        ({"loss": "ce", "vocabulary": "sampled"}, "the full vocabulary"),
        ({"token_shift": 1, "step_size": "loss", "optimizer": "muon"}, "A token_shift needs step_size 'rate'"),
        ({"token_shift": 1, "warm_start_tokens": 100}, "warm start solves for the model's prediction at the same position"),
        ({"token_shift": 2048}, "token_shift must be smaller than max_seq_len"),
        ({"token_shift": 1.5}, "token_shift can't be 1.5"),
        ({"loss": "mse"}, "loss must be one of kl, ce"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_recipes_take_them():
    assert resolve("paper", None, {"loss": "ce"})[1].shift == 1
    assert TrainingConfig(loss="ce", warm_start_tokens=64).shift == 1
    shifted = resolve("fast", None, {"token_shift": 1, "step_size": "rate", "learning_rate": 0.02})[1]
    assert (shifted.warm_start_tokens, shifted.shift, shifted.shuffle_tokens) == (0, 1, 0)
    of_text = {"loss": "ce", "vocabulary": "full", "step_size": "rate", "learning_rate": 0.02}
    assert resolve("fast", None, of_text)[1].shuffle_tokens == 0
    assert resolve("fast", None, of_text | {"token_shift": 0})[1].shuffle_tokens == recipe("fast").shuffle_tokens
    with pytest.raises(ValueError, match="give the recipe paper"):
        resolve("fast", None, {"loss": "ce"})
