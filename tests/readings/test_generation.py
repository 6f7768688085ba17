"""Generation read layer by layer, and from one layer: against recomputation of the whole text without a cache."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.readings import source
from support import oracle
from support.mocks import MockModel, WordTokenizer, tiny_llama

PROMPT = [3, 1, 4, 1, 5]
STEPS = 6


class Tokenizer(WordTokenizer):
    eos_token_id = None


@pytest.fixture
def model():
    return InterpretableModel(tiny_llama(layers=3), Tokenizer(96))


@pytest.fixture
def lens(rng):
    return oracle.random_lens(rng)


def recomputed(model, layer=None, lens=None):
    """Return the greedy tokens of STEPS whole passes without a cache."""
    ids = list(PROMPT)
    for _ in range(STEPS):
        states = model.capture(ids)
        if layer is None:
            z = model.model(mx.array([ids]))[0, -1]
        else:
            h = states.hidden[layer][0, -1:]
            z = model.unembed(h if lens is None else lens(h, layer % 3))[0]
        ids.append(int(mx.argmax(z).item()))
    return ids[len(PROMPT) :]


def test_every_step_reads_what_the_whole_text_reads(model, lens):
    steps = list(model.generate_with_lens(PROMPT, lens, max_tokens=STEPS, embedding=True, top_k=3, tokens=["w7"]))
    generated = [step.token_id for step in steps]
    assert generated == recomputed(model)
    assert "".join(step.text for step in steps) == " ".join(f"w{i}" for i in generated)
    assert [len(step.trajectory) for step in steps] == [5, 1, 1, 1, 1, 1]
    whole = model.trajectory(PROMPT + generated, lens, embedding=True, top_k=3, tokens=["w7"])
    for step in steps:
        t = step.trajectory
        expected = whole.select(positions=slice(t.first_position, t.first_position + len(t)))
        assert t.token_ids.tolist() == expected.token_ids.tolist()
        assert t.target_ids.tolist() == expected.target_ids.tolist()
        assert t.target_ids[-1] == step.token_id == t.model.top_ids[0, -1, 0]
        for name, values in expected.to_numpy().items():
            if name != "top_ids":
                np.testing.assert_allclose(t.to_numpy()[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
    # A step can be read again, as any trajectory.
    np.testing.assert_allclose(steps[2].trajectory.follow([7]).chosen_probabilities, steps[2].trajectory.chosen_probabilities, rtol=1e-4)


def test_a_long_prompt_is_read_in_parts(model, monkeypatch):
    prompt = np.random.default_rng(0).integers(0, 96, 40).tolist()
    expected = [(s.token_id, s.trajectory.kl) for s in model.generate_with_lens(prompt, max_tokens=3)]
    monkeypatch.setattr(source, "ROWS_BYTES", 1)
    found = [(s.token_id, s.trajectory.kl) for s in model.generate_with_lens(prompt, max_tokens=3)]
    assert [token for token, _ in found] == [token for token, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("tuned", [False, True])
def test_generation_from_a_layer_equals_recomputation(model, lens, layer, tuned):
    used = lens if tuned else None
    found = [token.token_id for token in model.generate_from_layer(PROMPT, layer, used, max_tokens=STEPS)]
    assert found == recomputed(model, layer, used)


def test_blocks_after_the_layer_never_run(model):
    def fail(*_, **__):
        raise AssertionError("ran")

    expected = [token.token_id for token in model.generate_from_layer(PROMPT, 1, max_tokens=3)]
    model.model.model.layers[2].mlp = fail
    assert [token.token_id for token in model.generate_from_layer(PROMPT, 1, max_tokens=3)] == expected


def test_draws_follow_the_seed_and_leave_the_global_state_alone(model):
    def drawn(seed):
        return [token.token_id for token in model.generate_from_layer(PROMPT, 0, max_tokens=12, temperature=3.0, seed=seed)]

    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    assert drawn(1) == drawn(1) != drawn(2)
    assert mx.random.uniform(shape=(3,)).tolist() == expected
    with_lens = [step.token_id for step in model.generate_with_lens(PROMPT, max_tokens=12, temperature=3.0, seed=1)]
    assert with_lens == [step.token_id for step in model.generate_with_lens(PROMPT, max_tokens=12, temperature=3.0, seed=1)]


def test_the_end_token_ends_the_text(model):
    tokens = recomputed(model)
    model.tokenizer.eos_token_ids = {tokens[2]}
    stop = tokens.index(tokens[2]) + 1
    assert [step.token_id for step in model.generate_with_lens(PROMPT, max_tokens=STEPS)] == tokens[:stop]


def test_characters_in_parts_appear_when_they_are_whole(model):
    model.tokenizer.decode = lambda ids: "".join("a" for _ in ids[: len(ids) // 2 * 2]) + ("\ufffd" if len(ids) % 2 else "")
    assert [step.text for step in model.generate_with_lens(PROMPT, max_tokens=4)] == ["", "aa", "", "aa"]


def test_bytes_that_never_become_a_character_appear(model):
    calls = []
    model.tokenizer.decode = lambda ids: calls.append(len(ids)) or "\ufffd" * len(ids)
    texts = [token.text for token in model.generate_from_layer(PROMPT, 0, max_tokens=90, temperature=2.0)]
    assert texts[:5] == ["", "", "", "\ufffd" * 4, ""]
    assert len("".join(texts)) == 90  # those of the last tokens too
    assert max(calls) <= 40  # a window, not the whole text
    assert "".join(step.text for step in model.generate_with_lens(PROMPT, max_tokens=3)) == "\ufffd" * 3
    end = recomputed(model)[1]
    model.tokenizer.eos_token_ids = {end}
    found = [step.text for step in model.generate_with_lens(PROMPT, max_tokens=9)]
    assert "".join(found) == "\ufffd" * len(found)


def test_a_long_text_is_decoded_in_a_window(model):
    steps = list(model.generate_from_layer(PROMPT, 0, max_tokens=80, temperature=2.0))
    assert "".join(step.text for step in steps) == " ".join(f"w{step.token_id}" for step in steps)


WRONG = [
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"max_tokens": 1.5}, "whole numbers"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": float("nan")}, "temperature must be"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused_at_once(model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate_with_lens(PROMPT, **options)
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate_from_layer(PROMPT, 0, **options)


def test_wrong_models_layers_and_prompts_are_refused_at_once(model):
    with pytest.raises(ValueError, match="there is no layer 3"):
        model.generate_from_layer(PROMPT, 3)
    with pytest.raises(ValueError, match="no tokens in the input"):
        model.generate_with_lens([])
    with pytest.raises(TypeError, match="one prompt, not from a list"):
        model.generate_with_lens(["w1", "w2"])
    with pytest.raises(ValueError, match="takes none"):
        InterpretableModel(MockModel(), WordTokenizer()).generate_with_lens(PROMPT)
    with pytest.raises(ValueError, match="damaged weights"):
        next(model.generate_from_layer(PROMPT, 0, lambda h, layer: h * mx.nan))
