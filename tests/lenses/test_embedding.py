"""The translator of the embedding, which is tuned-lens's layer 0, and the lens as a sequence of translators."""

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from metalens import TunedLens
from metalens.lenses.lens_file import is_lens_archive
from metalens.lenses.translators import VARIANTS
from metalens.models.layers import EMBEDDING

FORMS = {"full": {}, "full, some layers": {"layers": [1]}, "low-rank": {"rank": 2}, "biases": {"bias_only": True}}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def randomized(form, num_layers=3, dim=5, seed=0):
    """A lens of this form whose every parameter is random."""
    lens = TunedLens(num_layers, dim, **form)
    rng = np.random.default_rng(seed)
    lens.update(tree_map(lambda p: mx.array(rng.normal(size=p.shape).astype(np.float32)), lens.parameters()))
    return lens


def assert_same(a, b):
    x, y = (dict(tree_flatten(lens.parameters())) for lens in (a, b))
    assert x.keys() == y.keys()
    assert a.translated == b.translated
    for name, array in x.items():
        np.testing.assert_array_equal(np.array(array), np.array(y[name]))


# ---------------------------------------------------------------- the embedding's translator


@each_form
def test_it_translates_like_the_others(form):
    lens = randomized(form | {"embedding": True})
    assert lens.translated == [EMBEDDING, *lens.layers]
    assert set(VARIANTS[lens.variant]) == {name for name, _ in tree_flatten(lens.embedding_translator.parameters())}
    h = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    weight, bias = (np.array(a).astype(np.float64) for a in lens.dense(EMBEDDING))
    np.testing.assert_allclose(np.array(lens(mx.array(h), EMBEDDING)), h @ weight.T + bias, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="vectors of width 5"):
        lens(mx.zeros((2, 4)), EMBEDDING)


def test_a_lens_without_one_leaves_the_embedding_as_it_is():
    lens = randomized({})
    h = mx.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert mx.array_equal(lens(h, EMBEDDING), h)
    assert lens.translated == [0, 1, 2]
    assert not [name for name, _ in tree_flatten(lens.parameters()) if "embedding" in name]
    with pytest.raises(ValueError, match="out of range"):
        lens(h, "unembedding")


def test_a_new_one_is_the_identity():
    for form in FORMS.values():
        weight, bias = TunedLens(3, 5, embedding=True, **form).dense(EMBEDDING)
        np.testing.assert_array_equal(np.array(weight), np.eye(5))
        np.testing.assert_array_equal(np.array(bias), np.zeros(5))


@each_form
def test_the_files_of_a_lens_with_the_embedding(tmp_path, form):
    lens = randomized(form | {"embedding": True})
    lens.save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text())
    assert described["format_version"] == 3
    parts = VARIANTS[lens.variant]
    with np.load(tmp_path / "x.npz") as archive:
        assert {name for name in archive.files if "embedding" in name} == {f"translators_embedding_{part}" for part in parts}
        for part in parts:
            np.testing.assert_array_equal(archive[f"translators_embedding_{part}"], np.array(lens.embedding_translator[part]))
    assert_same(TunedLens.load(tmp_path / "x"), lens)


def test_files_of_older_versions_hold_w_less_the_identity(tmp_path):
    """They had embedding_weight and embedding_bias, which came from folders of tuned-lens."""
    lens = randomized({})
    lens.save(tmp_path / "x")
    with np.load(tmp_path / "x.npz") as archive:
        stored = dict(archive)
    np.savez(tmp_path / "x.npz", **stored, embedding_weight=np.full((5, 5), 0.25, np.float32), embedding_bias=np.ones(5, np.float32))
    (tmp_path / "x.json").write_text(json.dumps({"num_layers": 3, "hidden_dim": 5, "format_version": 1}))
    found = TunedLens.load(tmp_path / "x")
    np.testing.assert_array_equal(np.array(found.embedding_translator.weight), np.eye(5, dtype=np.float32) + 0.25)
    np.testing.assert_array_equal(np.array(found.embedding_translator.bias), np.ones(5))
    assert is_lens_archive(tmp_path / "x.npz")


@pytest.mark.parametrize("form", [{"rank": 2}, {"bias_only": True, "layers": [0, 2]}], ids=["low-rank", "biases"])
def test_older_files_of_a_variant_hold_the_whole_matrix_of_the_embedding(tmp_path, form):
    """Version 2 stored it for every variant. A lens has translators of one variant, so that it becomes a full lens, the same function."""
    lens = randomized(form)
    lens.save(tmp_path / "x")
    with np.load(tmp_path / "x.npz") as archive:
        stored = dict(archive)
    np.savez(tmp_path / "x.npz", **stored, embedding_weight=np.full((5, 5), 0.25, np.float32), embedding_bias=np.ones(5, np.float32))
    described = {key: value for key, value in json.loads((tmp_path / "x.json").read_text()).items() if key != "checksums"}
    assert described["format_version"] == 2
    (tmp_path / "x.json").write_text(json.dumps(described))
    with pytest.warns(UserWarning, match="read as a full lens"):
        found = TunedLens.load(tmp_path / "x")
    assert found.variant == "full"
    np.testing.assert_array_equal(np.array(found.dense(EMBEDDING)[0]), np.eye(5, dtype=np.float32) + 0.25)
    np.testing.assert_array_equal(np.array(found.dense(EMBEDDING)[1]), np.ones(5))
    for layer in range(3):
        for a, b in zip(found.dense(layer), lens.dense(layer), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
    found.save(tmp_path / "again")
    assert_same(TunedLens.load(tmp_path / "again"), found)


@pytest.mark.parametrize(("form", "layer"), [({"rank": 2}, EMBEDDING), ({"bias_only": True}, EMBEDDING), ({"bias_only": True}, 1), ({}, 2)], ids=str)
def test_a_translator_of_another_variant_is_not_saved_in_part(tmp_path, form, layer):
    lens = randomized(form)
    other = randomized({"embedding": True} if form else {"rank": 2}).translator_of(layer)
    if layer == EMBEDDING:
        lens.embedding_translator = other
    else:
        lens.translators[layer] = other
    where = "the embedding" if layer == EMBEDDING else f"layer {layer}"
    with pytest.raises(ValueError, match=rf"The translator of {where} holds .*a lens of the variant '{lens.variant}' stores .*to_full\(\)"):
        lens.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    lens.to_full().save(tmp_path / "x")  # the way out that the error names
    for a, b in zip(TunedLens.load(tmp_path / "x").dense(layer), lens.dense(layer), strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("form", [{"rank": 2}, {"bias_only": True}], ids=["low-rank", "biases"])
def test_the_old_name_gives_a_variant_no_whole_matrix(form):
    lens = randomized(form | {"embedding": True})
    before = lens.embedding_translator
    with pytest.warns(DeprecationWarning, match="embedding_translator"), pytest.raises(ValueError, match=r"to_full\(\)"):
        lens.embedding = (mx.zeros((5, 5)), mx.zeros((5,)))
    assert lens.embedding_translator is before
    with pytest.warns(DeprecationWarning, match="embedding_translator"):
        lens.embedding = None
    assert lens.translated == [0, 1, 2]


def test_the_old_name_of_the_embedding():
    lens = randomized({})
    with pytest.warns(DeprecationWarning, match="is now TunedLens.embedding_translator"):
        assert lens.embedding is None
    with pytest.warns(DeprecationWarning, match="embedding_translator"):
        lens.embedding = (mx.full((5, 5), 0.5), mx.full((5,), 2.0))
    np.testing.assert_array_equal(np.array(lens.embedding_translator.weight), np.eye(5) + 0.5)
    with pytest.warns(DeprecationWarning, match="embedding_translator"):
        a, b = lens.embedding
    np.testing.assert_array_equal(np.array(a), np.full((5, 5), 0.5))
    np.testing.assert_array_equal(np.array(b), np.full(5, 2.0))
    with pytest.warns(DeprecationWarning, match="embedding_translator"):
        lens.embedding = None
    assert lens.translated == [0, 1, 2]


def test_half_an_embedding(tmp_path):
    randomized({"embedding": True}).save(tmp_path / "x")
    with np.load(tmp_path / "x.npz") as archive:
        stored = dict(archive)
    for change, message in (
        ({"translators_embedding_bias": None}, "it holds no translators_embedding_bias"),
        ({"translators_embedding_bias": np.ones(4)}, "embedding_bias has shape"),
        ({"translators_embedding_weight": np.full((5, 5), np.nan)}, "embedding_weight holds NaN"),
        ({"embedding_weight": np.ones((5, 5))}, "it also holds embedding_weight"),
    ):
        np.savez(tmp_path / "x.npz", **{name: array for name, array in (stored | change).items() if array is not None})
        with pytest.raises(ValueError, match=message):
            TunedLens.load(tmp_path / "x")


# ---------------------------------------------------------------- a sequence of translators


def test_indices_and_iteration():
    lens = randomized({"layers": [0, 2], "embedding": True})
    assert len(lens) == 3
    assert [id(t) for t in lens] == [id(t) for t in lens.translators]
    assert lens[0] is lens.translators[0]
    assert lens[-1] is lens.translators[2]
    assert lens[1:] == lens.translators[1:]
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"no layer {index}: its layers are 0 to 2"):
            lens[index]


def test_it_is_a_module_all_the_same():
    """MLX keeps a module's parameters as the items of a dict, whose iteration is another thing."""
    lens = randomized({"embedding": True})
    assert sorted(lens.keys()) == ["embedding_translator", "translators"]
    assert lens["translators"] is lens.translators
    names = {name for name, _ in tree_flatten(lens.parameters())}
    assert {"translators.2.bias", "embedding_translator.weight"} <= names
    assert_same(copy.deepcopy(lens), lens)
    mx.eval(lens)
    other = TunedLens(3, 5, embedding=True)
    other.update(lens.parameters())
    assert_same(other, lens)

    h = mx.ones((2, 5))
    optimizer = optim.SGD(learning_rate=0.1)
    _, gradient = nn.value_and_grad(lens, lambda h: mx.sum(mx.square(lens(lens(h, EMBEDDING), 1))))(h)
    optimizer.update(lens, gradient)
    assert not mx.array_equal(lens.embedding_translator.bias, other.embedding_translator.bias)
    assert mx.array_equal(lens[0].bias, other[0].bias)
