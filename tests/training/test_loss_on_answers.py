"""The loss on some tokens only: in sequences, in every phase of a run, in its checkpoints and in evaluation, against NumPy on the rows that count."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import InterpretableModel, TunedLens, evaluate, train
from metalens.cli import main
from metalens.evaluation.text import Sequences
from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates
from metalens.training import CheckpointFolder, TrainingConfig, TrainingInterruptedError, batching, loss_and_gradient, train_loop
from metalens.training.batching import BatchedCapture
from metalens.training.data import Corpus, Sampler, open_corpus, read_inputs
from metalens.training.data.sampler import NotEnoughDataError
from metalens.training.guard import held_back_loss
from metalens.training.settle import _budget_of_minutes
from metalens.utils.errors import InvalidValueError
from support import oracle
from support.bos import ASSISTANT, BOS, USER, bos_tokenizer, save_bos_model

LENGTH, VOCAB = 16, 131


def masked(tokens, seed=0, part=0.3, prefix=()):
    """Ids of which some are answers, in runs."""
    rng = np.random.default_rng(seed)
    answers = np.repeat(rng.random(tokens // 5 + 1) < part, 5)[:tokens]
    answers[tokens // 2 : tokens // 2 + 2] = True
    return Corpus.from_ids(rng.integers(0, VOCAB, tokens), answers=answers, prefix=prefix)


# ------------------------------------------------------------------ sequences


def test_tokens_are_those_that_count_and_sequences_without_one_are_left_out():
    #                               0        4        8        12
    corpus = Corpus.from_ids(np.arange(14), answers=[0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    sampler = Sampler(corpus, 4)
    assert (len(sampler), sampler.total_tokens) == (3, 7)
    step = sampler.take_step(3)  # the second half of the last answer is in a sequence of its own, cut in its middle
    assert [s.tolist() for s in step.sequences] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert [m.tolist() for m in step.counted] == [[False, True, True, False], [True, True, True, True]]
    assert step.tokens == 6
    assert sampler.remaining_tokens() == 1
    with pytest.raises(NotEnoughDataError, match="2 tokens are needed .2 tokens., 1 of 7 are left"):
        sampler.take_step(2)
    last = sampler.take_step(1)
    assert ([s.tolist() for s in last.sequences], [m.tolist() for m in last.counted]) == ([[12, 13]], [[True, False]])


def test_an_answer_longer_than_a_sequence_counts_in_all_its_sequences():
    corpus = Corpus.from_ids(np.arange(12), answers=[0, 0, *[1] * 9, 0], prefix=(99,))
    step = Sampler(corpus, 5).take_step(9)
    assert [s.tolist() for s in step.sequences] == [[99, 0, 1, 2, 3], [99, 4, 5, 6, 7], [99, 8, 9, 10, 11]]
    assert np.concatenate(step.counted).astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0]  # the prefix does not count


@given(
    st.lists(st.booleans(), min_size=2, max_size=120).filter(lambda mask: any(mask[1:])),
    st.integers(1, 9),
    st.integers(0, 2),
    st.sampled_from([None, 3]),
    st.integers(1, 4),
    st.integers(1, 30),
)
def test_every_token_that_counts_is_there_once_whatever_the_number_of_processes(mask, room, prefix, seed, world, tokens):
    corpus = Corpus.from_ids(np.arange(len(mask)), answers=mask, prefix=(999,) * prefix)
    expected = {i for i in range(len(mask) - 1) if mask[i + 1]}
    whole, shares = Sampler(corpus, room + prefix, seed=seed), [Sampler(corpus, room + prefix, seed=seed) for _ in range(world)]
    seen = []
    while whole.remaining_tokens() >= tokens:
        step, parts = whole.take_step(tokens), [share.take_step(tokens, rank, world) for rank, share in enumerate(shares)]
        assert step.tokens == sum(int(m.sum()) for m in step.counted) == sum(int(m.sum()) for part in parts for m in part.counted)
        assert tokens <= step.tokens < tokens + room
        assert {part.tokens for part in parts} == {step.tokens}
        assert all(m.any() and m.size == s.size for s, m in zip(step.sequences, step.counted, strict=True))
        seen += [i for s, m in zip(step.sequences, step.counted, strict=True) for i in s[m]]
    assert len(seen) == len(set(seen))
    assert set(seen) <= expected
    assert whole.total_tokens == len(expected)


def test_what_is_held_back_has_tokens_that_count():
    sampler = Sampler(masked(200 * LENGTH), LENGTH, held_back=64)
    held = sampler.held_back_step()
    assert 0 < held.tokens == sum(int(m.sum()) for m in held.counted) <= 64
    assert all(m[-1] for m in held.counted)  # nothing behind the last one is read
    trained = {s.tobytes() for s in sampler.take_step(sampler.total_tokens).sequences}
    assert not {s.tobytes() for s in held.sequences} & trained


# ------------------------------------------------------------------ rows


def rows_of(model, step, layer):
    """The rows that count, of one sequence after another, float64."""
    found = []
    for sequence, mask in zip(step.sequences, step.counted, strict=True):
        found.append(oracle.wide(model.source.capture(mx.array(sequence[None])).hidden[layer])[0][mask])
    return np.concatenate(found)


def by_row(rows):
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("together", [1, 3])
def test_rows_are_those_that_count(tiny, together, monkeypatch):
    """Several sequences in a pass, and several steps; their lengths differ."""
    monkeypatch.setattr(batching, "PASS_TOKENS", 4 * LENGTH)
    sampler = Sampler(masked(11 * LENGTH + 5, part=0.6), LENGTH, seed=1)
    steps = [sampler.take_step(20) for _ in range(together)]
    captured = list(map(list, BatchedCapture(tiny.source, VOCAB).by_step(steps)))
    for step, passes in zip(steps, captured, strict=True):
        assert sum(each.num_rows for each in passes) == step.tokens
        for layer in range(3):
            found = np.concatenate([oracle.wide(each.rows(layer)) for each in passes])
            np.testing.assert_allclose(by_row(found), by_row(rows_of(tiny, step, layer)), atol=1e-5)


def config_of(**changes):
    base = {"num_steps": 1, "max_seq_len": LENGTH, "tokens_per_step": 4 * LENGTH, "loss_on": "answers", "gradient_clip": 1e9}
    return TrainingConfig(**base | changes)


def test_a_step_is_on_the_rows_that_count(tiny):
    corpus, config, told = masked(60 * LENGTH), config_of(learning_rate=0.5, reduction="sum", momentum=0.0), []
    step = Sampler(corpus, LENGTH).take_step(config.step_tokens)
    hidden = [rows_of(tiny, step, layer) for layer in range(3)]
    lens = train_loop(tiny.source, tiny.unembed, corpus, config, callbacks=[told.append])
    (progress,) = told
    assert progress.tokens == step.tokens == sum(int(m.sum()) for m in step.counted)
    normed = [oracle.wide(tiny.unembed.norm(mx.array(h.astype(np.float32)))) for h in hidden]
    z = [oracle.head_logits(n, tiny.unembed.head) for n in normed]
    for layer in range(3):
        assert progress.losses[layer] == pytest.approx(np.mean(oracle.kl(z[-1], z[layer])), rel=1e-4, abs=1e-7)
    batch = HiddenStates([mx.array(h.astype(np.float32)[None]) for h in hidden], mx.zeros(()))
    identity = TunedLens(3, 64)
    _, gradient = loss_and_gradient(identity, batch, tiny.unembed)
    for layer in range(2):
        for name, value in parameters_of(identity.translators[layer]).items():
            expected = value - 0.5 * 3 * gradient["translators"][layer][name]
            np.testing.assert_allclose(parameters_of(lens.translators[layer])[name], expected, atol=2e-5)


def test_the_warm_start_is_on_the_rows_that_count(tiny):
    """Against NumPy's least squares."""
    corpus, config = masked(400 * LENGTH), config_of(num_steps=0, warm_start_tokens=300, ridge=1e-2)
    step = Sampler(corpus, LENGTH).take_step(300)
    lens = train_loop(tiny.source, tiny.unembed, corpus, config)
    last = rows_of(tiny, step, 2)
    for layer in range(2):
        h = rows_of(tiny, step, layer)
        scale, n = np.mean(h**2), len(h)
        inputs = np.block([[h / n**0.5, np.full((n, 1), n**-0.5)], [np.eye(64) * (1e-2 * scale) ** 0.5, np.zeros((64, 1))]])
        solved = np.linalg.lstsq(inputs, np.concatenate([(last - h) / n**0.5, np.zeros((64, 64))]), rcond=None)[0]
        np.testing.assert_allclose(lens.translators[layer].weight, np.eye(64) + solved[:-1].T, atol=2e-3)
        np.testing.assert_allclose(lens.translators[layer].bias, solved[-1], atol=2e-3)


def test_the_guard_reads_the_rows_that_count(tiny):
    held = Sampler(masked(300 * LENGTH), LENGTH, held_back=64).held_back_step()
    identity = [parameters_of(TunedLens(3, 64).translators[layer]) for layer in range(3)]
    *kl, tokens = held_back_loss(identity, range(3), held, BatchedCapture(tiny.source, VOCAB), tiny.unembed).tolist()
    z = [oracle.head_logits(oracle.wide(tiny.unembed.norm(mx.array(rows_of(tiny, held, i).astype(np.float32)))), tiny.unembed.head) for i in range(3)]
    assert tokens == held.tokens == len(z[0])
    np.testing.assert_allclose(kl, [np.sum(oracle.kl(z[-1], each)) for each in z], rtol=1e-4, atol=1e-4)


BY_LOSS = {"optimizer": "muon", "step_size": "loss", "learning_rate": 0.1, "reduction": "sum"}


def test_what_does_not_count_decides_nothing(tiny):
    """Other words behind the last token that counts, in every sequence: the same lens to rounding, from the input scales to the guard."""
    corpus = masked(300 * LENGTH, part=0.4)
    config = config_of(**BY_LOSS, num_steps=4, tokens_per_step=2 * LENGTH, guard_tokens=32, warm_start_tokens=0)
    ids, counted = corpus.ids.copy(), corpus.counted.reshape(-1, LENGTH)
    last = np.where(counted.any(1), LENGTH - np.argmax(counted[:, ::-1], 1), 0)
    behind = np.arange(LENGTH) >= last[:, None]
    assert 0.1 < np.mean(behind) < 0.9
    ids[behind.reshape(-1)] = np.random.default_rng(9).integers(0, VOCAB, int(behind.sum()))
    other = Corpus.from_ids(ids, answers=np.concatenate([[False], corpus.counted[:-1]]))
    assert not np.array_equal(other.ids, corpus.ids)
    lenses = [train_loop(tiny.source, tiny.unembed, each, config) for each in (corpus, other)]
    for ours, theirs in zip(*(lens.translators for lens in lenses), strict=True):
        np.testing.assert_allclose(ours.weight, theirs.weight, atol=1e-4)
    assert not np.allclose(lenses[0].translators[0].weight, np.eye(64), atol=1e-3)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tiny, tmp_path):
    corpus = masked(300 * LENGTH)
    config = config_of(**BY_LOSS, num_steps=6, tokens_per_step=LENGTH, guard_tokens=32, warm_start_tokens=100, seed=2)
    straight, lens = train_loop(tiny.source, tiny.unembed, corpus, config), None
    stops = 0
    while lens is None:
        left = iter(range(1))
        try:
            lens = train_loop(
                tiny.source,
                tiny.unembed,
                corpus,
                config,
                checkpoints=CheckpointFolder(tmp_path),
                resume=True,
                stop=lambda left=left: next(left, None) is None,
            )
        except TrainingInterruptedError:
            stops += 1
    assert stops > 1
    for ours, theirs in zip(lens.translators, straight.translators, strict=True):
        assert mx.array_equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("other", ["all tokens", "another mask"])
def test_a_checkpoint_of_other_tokens_is_refused(tiny, tmp_path, other):
    corpus = masked(100 * LENGTH)
    with pytest.raises(TrainingInterruptedError):
        train_loop(tiny.source, tiny.unembed, corpus, config_of(num_steps=4), checkpoints=CheckpointFolder(tmp_path), stop=lambda: True)
    answers = np.concatenate([[False], corpus.counted[:-1]])
    answers[-1] = ~answers[-1]
    changed = Corpus.from_ids(corpus.ids) if other == "all tokens" else Corpus.from_ids(corpus.ids, answers=answers)
    with pytest.raises(InvalidValueError, match="corpus fingerprint was"):
        train_loop(tiny.source, tiny.unembed, changed, config_of(num_steps=4), checkpoints=CheckpointFolder(tmp_path), resume=True)
    plain = config_of(num_steps=4, loss_on="all")
    with pytest.raises(InvalidValueError, match="loss_on was 'answers' and is 'all'"):
        train_loop(tiny.source, tiny.unembed, Corpus.from_ids(corpus.ids), plain, checkpoints=CheckpointFolder(tmp_path), resume=True)


# ------------------------------------------------------------------ train and evaluate


TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, whose template is TEMPLATE, and its conversations."""
    folder = tmp_path_factory.mktemp("chat")
    save_bos_model(folder / "model")
    bos_tokenizer(TEMPLATE).save_pretrained(folder / "model")
    rng = np.random.default_rng(4)

    def said(most):
        return " ".join(f"w{i}" for i in rng.integers(5, 96, rng.integers(0, most)))

    chats = [
        [{"role": ("user", "assistant")[turn % 2], "content": said(30)} for turn in range(rng.integers(1, 7))] for _ in range(60)
    ]  # several turns, empty answers, answers longer than a sequence of 16, conversations without an answer
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in chats))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return InterpretableModel(str(folder / "model"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path / "cache"))


SMALL = {"recipe": "adam", "num_steps": 3, "max_seq_len": LENGTH, "tokens_per_step": 32, "loss_on": "answers"}


def test_from_a_file_and_from_python_and_what_the_lens_remembers(folder, model):
    lens = train(model, folder / "chat.jsonl", field="messages", join="packed", **SMALL)
    about = lens.provenance["training"]
    corpus = open_corpus(folder / "chat.jsonl", model.tokenizer, field="messages", join="packed", loss_on="answers")
    assert (about["loss_on"], about["data"]) == ("answers", corpus.identity())
    assert about["data"]["counted"] == corpus.counted_tokens < corpus.tokens / 1.5
    sampler = Sampler(corpus, LENGTH, seed=0, held_back=6)
    assert lens.provenance["tokens"] == sum(sampler.take_step(32).tokens for _ in range(3))
    chats = [json.loads(line)["messages"] for line in (folder / "chat.jsonl").read_text().splitlines()]
    for same in (train(model, chats, join="packed", **SMALL), train(model, corpus, **SMALL)):
        for ours, theirs in zip(lens.translators, same.translators, strict=True):
            assert mx.array_equal(ours.weight, theirs.weight)
    everything = train(model, chats, join="packed", **SMALL | {"loss_on": "all"})
    assert not mx.array_equal(everything.translators[0].weight, lens.translators[0].weight)
    assert "counted" not in everything.provenance["training"]["data"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([5, 6, 7] * 100, {}, "loss_on='answers' needs to know the answers, and token ids have none"),
        (["some text of no one"], {}, "text 0: this is plain text"),
        (masked(300), {"loss_on": "all"}, "The Corpus has answers, and loss_on='all' counts all tokens"),
        (masked(300), {"loss_on": "some"}, "loss_on must be one of all, answers"),
    ],
)
def test_text_and_setting_must_fit(model, data, options, message):
    with pytest.raises(InvalidValueError, match=re.escape(message)):
        train(model, data, **SMALL | options)


def test_too_few_answers(model):
    chats = [[{"role": "user", "content": "w5 " * 300}, {"role": "assistant", "content": "w6"}]] * 5
    with pytest.raises(NotEnoughDataError, match="3 steps of 32 tokens need 96 tokens, the text has 10"):
        train(model, chats, **SMALL)


def test_minutes_pay_for_the_tokens_between(model, monkeypatch):
    """The model reads all tokens: of answers that are a tenth of a text, fewer fit into the same time."""
    from metalens.training.distributed import Group
    from metalens.training.settle import Wishes
    from support.machines import machine

    monkeypatch.setattr("metalens.training.settle.measured_speed", lambda _: machine(1e-9, 1e8, 1e12))
    wishes = Wishes("ridge", None, {"loss_on": "answers"}, 1.0)
    whole, tenth = (_budget_of_minutes(wishes, model, Group(), None, share)["tokens"] for share in (1.0, 0.1))
    assert whole / tenth == pytest.approx(10, rel=0.1)


def test_an_evaluation_of_the_answers(folder, model):
    """Against NumPy on the rows that count; the last token of a sequence has no next one."""
    corpus = open_corpus(folder / "chat.jsonl", model.tokenizer, field="messages", loss_on="answers")
    lens = oracle.random_lens(np.random.default_rng(1), 2, 64)
    found = evaluate(model, corpus, lens, max_seq_len=LENGTH, layer_transfer=True, logit_stats=True)
    sequences = [(np.array(ids), mask) for ids, mask in Sequences(model, corpus, LENGTH).masked()]
    assert all(ids[0] == BOS and mask.any() and not mask[0] for ids, mask in sequences)
    assert sum(int(mask.sum()) for _, mask in sequences) == found.tokens == corpus.counted_tokens
    z, labels, text = {"model": []}, [], ""
    for ids, mask in sequences:
        hidden = [h[0] for h in model.source.capture(mx.array(ids[None])).hidden]
        for layer, h in enumerate(hidden):
            for name, state in ((layer, h), (f"lens {layer}", lens(h, layer))):
                z.setdefault(name, []).append(oracle.head_logits(oracle.wide(model.unembed.norm(state)), model.unembed.head)[mask])
        labels += [*np.append(ids[1:], -1)[mask]]
    z = {name: np.concatenate(each) for name, each in z.items() if each}
    labels = np.array(labels)
    labeled = labels >= 0
    assert 0 < np.sum(~labeled) < labels.size / 10
    text = model.decode([int(i) for i, before in zip(corpus.ids[1:], corpus.counted[:-1], strict=True) if before])
    assert found.bytes_per_token * found.tokens == pytest.approx(len(text.encode()), rel=0.02)
    for layer in range(2):
        for scores, name in ((found.logit[layer], layer), (found.tuned[layer], f"lens {layer}")):
            nll = -oracle.log_softmax(z[name])[np.flatnonzero(labeled), labels[labeled]]
            assert scores.kl == pytest.approx(np.mean(oracle.kl(z[1], z[name])), rel=1e-4, abs=1e-6)
            assert scores.ce == pytest.approx(np.mean(nll), rel=1e-5)
            assert scores.top1 == pytest.approx(np.mean(z[name].argmax(1) == z[1].argmax(1)), abs=0.01)
        assert found.transfer.ce[layer][layer] == pytest.approx(found.tuned[layer].ce, rel=1e-6)
    assert found.logit_stats["model"].n == found.tokens
    assert evaluate(model, corpus.ids, lens, max_seq_len=LENGTH).tokens > 2 * found.tokens


def test_an_evaluation_stops_after_the_tokens_read(folder, model):
    corpus = open_corpus(folder / "chat.jsonl", model.tokenizer, field="messages", loss_on="answers")
    found = evaluate(model, corpus, max_seq_len=LENGTH, max_tokens=100)
    assert found.tokens == int(corpus.counted[:100].sum())


def test_the_command_line(folder, tmp_path, capsys):
    data = ["--data", str(folder / "chat.jsonl"), "--field", "messages", "--loss-on", "answers", "--max-seq-len", str(LENGTH)]
    settings = ["--recipe", "adam", "--steps", "2", "--tokens-per-step", "32"]
    main(["train", str(folder / "model"), *data, *settings, "--out", str(tmp_path / "lens")], standalone_mode=False)
    assert TunedLens.load(tmp_path / "lens").provenance["training"]["loss_on"] == "answers"
    capsys.readouterr()
    main(["eval", str(folder / "model"), *data, "--lens", str(tmp_path / "lens"), "--json"], standalone_mode=False)
    answers = json.loads(capsys.readouterr().out)["tokens"]
    data[data.index("answers")] = "all"
    main(["eval", str(folder / "model"), *data, "--json"], standalone_mode=False)
    assert answers < json.loads(capsys.readouterr().out)["tokens"] / 1.5


def test_the_answers_of_the_template():
    """What the fixtures rest on."""
    corpus = open_corpus(
        read_inputs([[{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]]), bos_tokenizer(TEMPLATE), loss_on="answers"
    )
    assert corpus.ids.tolist() == [1, USER, 5, ASSISTANT, 6, 1]
    assert corpus.counted.tolist() == [False, False, False, True, True, False]
