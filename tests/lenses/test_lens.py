import json
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from metalens import InterpretableModel, LogitLens, TunedLens
from metalens.lenses.lens_file import lens_files
from support.lenses import trained
from support.mocks import DIM, LAYERS, MockModel


def values(lens):
    return [np.array(array) for translator in lens.translators for array in (translator.weight, translator.bias)]


def assert_same(a, b):
    assert (a.num_layers, a.hidden_dim) == (b.num_layers, b.hidden_dim)
    for x, y in zip(values(a), values(b), strict=True):
        assert x.dtype == y.dtype == np.float32
        np.testing.assert_array_equal(x, y)


def names(folder):
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- the lens itself


def test_a_new_lens_is_the_identity():
    lens = TunedLens(3, 5)
    assert len(lens.translators) == 3
    for translator in lens.translators:
        assert isinstance(translator, nn.Linear)
        np.testing.assert_array_equal(np.array(translator.weight), np.eye(5, dtype=np.float32))
        np.testing.assert_array_equal(np.array(translator.bias), np.zeros(5, dtype=np.float32))


@pytest.mark.parametrize("size", [(0, 4), (2, 0), (-1, 4)])
def test_a_lens_of_no_size(size):
    with pytest.raises(ValueError, match="at least one layer and one dimension"):
        TunedLens(*size)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 0, 3)])
def test_the_affine_map(shape):
    lens = trained()
    h = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for i, translator in enumerate(lens.translators):
        expected = h.astype(np.float64) @ np.array(translator.weight).astype(np.float64).T + np.array(translator.bias)
        found = lens(mx.array(h), i)
        assert found.dtype == mx.float32
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_states_become_float32(dtype):
    lens = trained()
    h = mx.array(np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)).astype(dtype)
    found = lens(h, 1)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), np.array(lens(h.astype(mx.float32), 1)), rtol=1e-6)


@pytest.mark.parametrize("number", [int, np.int32, np.int64, np.uint8])
def test_whole_numbers_of_numpy_name_layers(number):
    lens = TunedLens(2, 4)
    lens.translators[1].bias = mx.ones((4,))
    assert lens(mx.zeros((4,)), number(1)).tolist() == [1, 1, 1, 1]
    assert lens.dense(number(1))[1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("layer", [2, -1, 99, np.int64(2), 1.0, None, "0"])
def test_layers_that_the_lens_does_not_have(layer):
    with pytest.raises(ValueError, match=rf"layer_idx {layer} out of range \[0, 2\)"):
        TunedLens(2, 3)(mx.zeros((3,)), layer)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 1), ()])
def test_vectors_of_another_width(shape):
    with pytest.raises(ValueError, match="vectors of width 3.*another model"):
        TunedLens(2, 3)(mx.zeros(shape), 0)


def test_the_logit_lens_changes_nothing():
    h = mx.array([1.0, 2.0])
    assert LogitLens()(h, 5) is h


def test_the_text_form_of_the_logit_lens():
    assert repr(LogitLens()) == "LogitLens()"


def test_help_describes_the_arguments():
    assert "num_layers: L, blocks of the model." in TunedLens.__init__.__doc__


def test_fitting_a_model():
    lens = TunedLens(2, 3)
    lens.check_fits(2, 3)
    for size in ((3, 3), (2, 4)):
        with pytest.raises(ValueError, match=rf"2 layers of width 3; the model has {size[0]} of width {size[1]}"):
            lens.check_fits(*size)


# ---------------------------------------------------------------- names of files


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("x", "x"),
        ("x.npz", "x"),
        ("x.json", "x"),
        ("Llama-3.2-1B", "Llama-3.2-1B"),
        ("Llama-3.2-1B.npz", "Llama-3.2-1B"),
        ("v1.0", "v1.0"),
        ("a.b/x.y", "a.b/x.y"),
        (".hidden", ".hidden"),
        ("x.npz.npz", "x.npz"),
    ],
)
def test_only_the_two_suffixes_are_taken_off(path, stem):
    assert lens_files(path) == (Path(stem + ".npz"), Path(stem + ".json"))
    assert lens_files(Path(path)) == lens_files(path)


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name(path):
    with pytest.raises(ValueError, match="names no lens file"):
        lens_files(path)


def test_names_with_dots_do_not_collide(tmp_path):
    small, large = trained(seed=1), trained(seed=2)
    small.save(tmp_path / "Llama-3.2-1B")
    large.save(tmp_path / "Llama-3.1-8B")
    assert names(tmp_path) == ["Llama-3.1-8B.json", "Llama-3.1-8B.npz", "Llama-3.2-1B.json", "Llama-3.2-1B.npz"]
    assert_same(TunedLens.load(tmp_path / "Llama-3.2-1B"), small)
    assert_same(TunedLens.load(tmp_path / "Llama-3.1-8B"), large)


@pytest.mark.parametrize("saved", ["x", "x.npz", "x.json"])
@pytest.mark.parametrize("loaded", ["x", "x.npz", "x.json"])
def test_either_suffix_or_none_names_the_pair(tmp_path, saved, loaded):
    lens = trained()
    lens.save(str(tmp_path / saved))
    assert names(tmp_path) == ["x.json", "x.npz"]
    assert_same(TunedLens.load(str(tmp_path / loaded)), lens)


def test_missing_folders_are_created(tmp_path):
    lens = trained()
    lens.save(tmp_path / "a" / "b" / "x")
    assert_same(TunedLens.load(tmp_path / "a" / "b" / "x"), lens)


# ---------------------------------------------------------------- what the files hold


def test_the_files_are_the_documented_ones(tmp_path):
    lens = trained(2, 3)
    lens.save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text())
    assert set(described.pop("checksums")) == {"weights", "description"}
    assert described == {"num_layers": 2, "hidden_dim": 3}
    with np.load(tmp_path / "x.npz") as archive:
        assert sorted(archive.files) == ["translators_0_bias", "translators_0_weight", "translators_1_bias", "translators_1_weight"]
        for i in range(2):
            np.testing.assert_array_equal(archive[f"translators_{i}_weight"], np.array(lens.translators[i].weight))
            np.testing.assert_array_equal(archive[f"translators_{i}_bias"], np.array(lens.translators[i].bias))
            assert archive[f"translators_{i}_weight"].dtype == np.float32


def test_16_bit_weights_are_saved_as_float32(tmp_path):
    lens = trained()
    lens.set_dtype(mx.bfloat16)
    lens.save(tmp_path / "x")
    lens.set_dtype(mx.float32)
    assert_same(TunedLens.load(tmp_path / "x"), lens)


def test_float64_and_integer_archives_load_as_float32(tmp_path):
    (tmp_path / "x.json").write_text('{"num_layers": 1, "hidden_dim": 2}')
    np.savez(tmp_path / "x.npz", translators_0_weight=np.eye(2) * 0.5, translators_0_bias=np.array([1, 2]))
    lens = TunedLens.load(tmp_path / "x")
    assert [a.dtype for a in values(lens)] == [np.float32, np.float32]
    np.testing.assert_array_equal(np.array(lens(mx.array([2.0, 4.0]), 0)), [2.0, 4.0])


@st.composite
def lenses(draw):
    num_layers, dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return [
        (draw(arrays.arrays(np.float32, (dim, dim), elements=finite)), draw(arrays.arrays(np.float32, (dim,), elements=finite)))
        for _ in range(num_layers)
    ]


@settings(max_examples=25, deadline=None)
@given(lenses(), st.sampled_from(["x", "x.npz", "dir/x.y.json"]))
def test_saving_and_loading_is_exact(parts, name):
    lens = TunedLens(len(parts), len(parts[0][1]))
    for translator, (weight, bias) in zip(lens.translators, parts, strict=True):
        translator.weight, translator.bias = mx.array(weight), mx.array(bias)
    with tempfile.TemporaryDirectory() as folder:
        lens.save(Path(folder) / name)
        assert_same(TunedLens.load(Path(folder) / name), lens)


# ---------------------------------------------------------------- failures while saving


def test_a_failure_while_writing_weights_leaves_the_old_lens(tmp_path, monkeypatch):
    old = trained(seed=1)
    old.save(tmp_path / "x")

    def half(file, **arrays):
        Path(file).write_bytes(b"PK half an archive")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="No space left"):
        trained(seed=2).save(tmp_path / "x")
    assert names(tmp_path) == ["x.json", "x.npz"]
    assert_same(TunedLens.load(tmp_path / "x"), old)


def test_a_failure_while_writing_a_new_lens_leaves_nothing(tmp_path, monkeypatch):
    def broken(file, **arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(KeyboardInterrupt):
        trained().save(tmp_path / "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("old_size", [(3, 3), (1, 3), (2, 4)], ids=["more layers before", "fewer layers before", "wider before"])
def test_a_failure_between_the_two_files_is_never_read_as_a_lens(tmp_path, monkeypatch, old_size):
    """The pair is two files: if the second write fails, loading gives a lens that was saved, or an error; never a mixture."""
    old, new = trained(*old_size, seed=1), trained(2, 3, seed=2)
    old.save(tmp_path / "x")
    original, calls = Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        new.save(tmp_path / "x")
    monkeypatch.undo()
    assert names(tmp_path) == ["x.json", "x.npz"]
    try:
        found = TunedLens.load(tmp_path / "x")
    except ValueError:
        return
    assert_same(found, old if found.num_layers == old.num_layers else new)


# ---------------------------------------------------------------- lenses and models


@pytest.mark.parametrize("size", [(LAYERS + 1, DIM), (LAYERS - 1, DIM), (LAYERS, DIM + 1), (LAYERS, DIM // 2)])
def test_a_lens_of_another_model(tmp_path, size):
    model = InterpretableModel(MockModel())
    lens = TunedLens(*size)
    message = rf"{size[0]} layers of width {size[1]}; the model has {LAYERS} of width {DIM}\. It was trained for another model"
    with pytest.raises(ValueError, match=message):
        model.tuned_lens([1, 2], lens)
    lens.save(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        model.load_tuned_lens(tmp_path / "x")


def test_the_models_own_lens_loads(tmp_path):
    lens = trained(LAYERS, DIM)
    lens.save(tmp_path / "x")
    assert_same(InterpretableModel(MockModel()).load_tuned_lens(tmp_path / "x"), lens)
