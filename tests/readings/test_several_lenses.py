"""Several lenses on one text: one forward pass, and the same numbers as each lens alone."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens
from metalens.readings import DIVERGENCES, join_trajectories, read_lenses_in_parts, source
from metalens.utils.errors import InvalidTypeError, InvalidValueError
from support import oracle
from support.mocks import MockModel, WordTokenizer, tiny_llama

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def model():
    return InterpretableModel(tiny_llama(layers=3), WordTokenizer(96))


@pytest.fixture
def lens(rng):
    lens = oracle.random_lens(rng)
    lens.embedding_translator = TunedLens(1, 64).translators[0]
    lens.embedding_translator.weight = mx.eye(64) + oracle.random_array(rng, 64, 64, scale=0.1)
    lens.embedding_translator.bias = oracle.random_array(rng, 64)
    return lens


@pytest.fixture
def passes(model, monkeypatch):
    """A list with the number of tokens of every forward pass."""
    counted, capture = [], model.source._capture

    def counting(ids, *args, **kwargs):
        counted.append(ids.shape[1])
        return capture(ids, *args, **kwargs)

    _ = model.unembed  # finding the head takes passes of its own
    monkeypatch.setattr(model.source, "_capture", counting)
    return counted


def assert_equal(found, expected):
    assert found.to_numpy().keys() == expected.to_numpy().keys()
    for name, values in expected.to_numpy().items():
        np.testing.assert_allclose(found.to_numpy()[name], values, **CLOSE, err_msg=name)
    for name, values in expected.model.statistics().items():
        np.testing.assert_allclose(found.model.statistics()[name], values, **CLOSE, err_msg=name)
    assert (found.lens, found.layers, found.untranslated, found.first_position) == (
        expected.lens,
        expected.layers,
        expected.untranslated,
        expected.first_position,
    )


@pytest.mark.parametrize(
    "options", [{}, {"embedding": True, "layers": [2, 0], "tokens": [7], "targets": IDS}, {"mask_input": True}, {"position": -2}]
)
def test_each_lens_reads_what_it_reads_alone(model, lens, options, passes):
    lenses = [None, lens, lambda h, layer: 0.5 * h]
    found = model.trajectories(IDS, lenses, **options)
    assert len(passes) == 1
    for each, alone in zip(found, lenses, strict=True):
        assert_equal(each, model.trajectory(IDS, alone, **options))


def test_a_model_without_a_cache():
    model = InterpretableModel(MockModel(), WordTokenizer())
    for each in model.trajectories(IDS, [None, None]):
        assert_equal(each, model.trajectory(IDS))


def test_parts_are_the_whole_and_are_compared_in_the_same_pass(model, lens, passes):
    parts = [*read_lenses_in_parts(model, IDS, [None, lens], part_size=4, compare_lenses=True, embedding=True)]
    assert passes == [4, 4, 3]
    whole = model.trajectories(IDS, [None, lens], embedding=True)
    for joined, expected in zip(map(join_trajectories, zip(*(part.trajectories for part in parts), strict=True)), whole, strict=True):
        assert_equal(joined, expected)
    expected = whole[1].compare(whole[0])
    (found,) = zip(*(part.comparisons for part in parts), strict=True)
    for name in DIVERGENCES:
        np.testing.assert_allclose(np.concatenate([getattr(c, name) for c in found], 1), getattr(expected, name), **CLOSE)
    assert (found[0].between, found[0].names, found[0].labels) == (expected.between, expected.names, expected.labels)
    assert not any(part.comparisons for part in read_lenses_in_parts(model, IDS, [None, lens]))


@pytest.mark.parametrize("size", [None, 1])
def test_two_lenses_on_one_text_are_compared_in_one_pass(model, lens, passes, monkeypatch, size):
    a, b = (model.trajectory(IDS * 3, each) for each in (lens, None))
    expected = a.compare(b).to_numpy()
    if size:
        monkeypatch.setattr(source, "ROWS_BYTES", size)
    passes.clear()
    found = a.compare(b).to_numpy()
    assert sum(passes) == 3 * len(IDS)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, **CLOSE)


@pytest.mark.parametrize("bytes_held", [None, 1])
def test_generation_through_two_lenses_runs_the_model_once_a_token(model, lens, passes, monkeypatch, bytes_held):
    prompt = IDS * 2
    if bytes_held:
        monkeypatch.setattr(source, "ROWS_BYTES", bytes_held)
    steps = [*model.generate_with_lenses(prompt, [None, lens], max_tokens=3, tokens=[7], compare_lenses=True)]
    assert passes == ([16, 6, 1, 1] if bytes_held else [22, 1, 1])
    alone = [[*model.generate_with_lens(prompt, each, max_tokens=3, tokens=[7])] for each in (None, lens)]
    for n, step in enumerate(steps):
        assert step.trajectory is step.trajectories[0]
        for each, of_lens in zip(step.trajectories, alone, strict=True):
            assert step.token_id == of_lens[n].token_id
            assert_equal(each, of_lens[n].trajectory)
            assert of_lens[n].comparisons == []
        (compared,) = step.comparisons
        again = step.trajectories[1].compare(step.trajectories[0])
        np.testing.assert_allclose(compared.js, again.js, rtol=1e-3, atol=1e-5)
        assert compared.names == ("tuned lens", "logit lens")


def test_no_lens_and_no_list_of_lenses(model, lens):
    with pytest.raises(InvalidValueError, match="no lens to read with"):
        model.trajectories(IDS, [])
    for wrong in ("my-lens", lens, None):
        with pytest.raises(InvalidTypeError, match="must be a list of lenses"):
            model.trajectories(IDS, wrong)
        with pytest.raises(InvalidTypeError, match="must be a list of lenses"):
            model.generate_with_lenses(IDS, wrong)
    with pytest.raises(InvalidTypeError, match="not a list of texts"):
        model.trajectories(["w1", "w2"], [None])
    with pytest.raises(InvalidTypeError, match="has no option top"):
        model.trajectories(IDS, [None], top=3)
    with pytest.raises(InvalidValueError, match="part_size"):
        read_lenses_in_parts(model, IDS, [None], part_size=0)
    with pytest.raises(InvalidValueError, match="layers"):
        model.trajectories(IDS, [None, TunedLens(2, 64)])


def test_damaged_weights_are_one_clear_error(model, lens):
    lens.translators[1].bias = mx.full((64,), float("nan"))
    with pytest.raises(InvalidValueError, match="NaN"):
        model.trajectories(IDS, [None, lens])
