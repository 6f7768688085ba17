"""Files of a lens that are missing, damaged, hostile or of something else: an error that names what is wrong."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from metalens import TunedLens
from support.lenses import trained


@pytest.fixture
def saved(tmp_path):
    """A saved lens of 2 layers and width 3; the path without suffix."""
    trained(2, 3).save(tmp_path / "x")
    return tmp_path / "x"


def npz(path):
    return path.with_suffix(".npz")


def rewrite(path, **changes):
    """Save the archive again with some arrays changed; None removes one."""
    with np.load(npz(path)) as archive:
        stored = {**archive, **changes}
    np.savez(npz(path), **{name: array for name, array in stored.items() if array is not None})


@pytest.mark.parametrize("missing", ["x.npz", "x.json"])
def test_a_missing_file_is_named(saved, missing):
    (saved.parent / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"No lens at .*{missing} is missing"):
        TunedLens.load(saved)


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="No lens at"):
        TunedLens.load(tmp_path / "nothing")


@pytest.mark.parametrize("kept", [0.0, 0.03, 0.5, 0.95])
def test_a_truncated_archive(saved, kept):
    content = npz(saved).read_bytes()
    npz(saved).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"x\.npz is damaged or no \.npz archive"):
        TunedLens.load(saved)


def test_a_flipped_bit(saved):
    content = bytearray(npz(saved).read_bytes())
    content[content.index(b"}", 100) + 80] ^= 64
    npz(saved).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        TunedLens.load(saved)


def test_a_text_file_in_place_of_the_archive(saved):
    npz(saved).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"x\.npz is damaged or no \.npz archive"):
        TunedLens.load(saved)


def test_a_single_array_in_place_of_the_archive(saved):
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3))
    npz(saved).write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"x\.npz is damaged or no \.npz archive"):
        TunedLens.load(saved)


def test_pickled_objects_are_not_loaded(saved):
    """Nor does the error say how to load them all the same."""
    rewrite(saved, translators_0_bias=np.array([{"a": 1}, None, 2], dtype=object))
    with pytest.raises(ValueError, match=r"x\.npz is damaged or no \.npz archive \(it holds Python objects, which are never loaded\)"):
        TunedLens.load(saved)
    npz(saved).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"x\.npz is damaged or no \.npz archive \(it does not begin as an archive does\)"):
        TunedLens.load(saved)


def test_an_archive_of_other_arrays(saved):
    np.savez(npz(saved), mean=np.zeros(3), std=np.ones(3))
    with pytest.raises(ValueError, match="is not a lens of 2 layers"):
        TunedLens.load(saved)


def test_a_zip_of_other_files(saved):
    with zipfile.ZipFile(npz(saved), "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="is not a lens of 2 layers"):
        TunedLens.load(saved)


def test_a_missing_array(saved):
    rewrite(saved, translators_1_bias=None)
    with pytest.raises(ValueError, match="is not a lens of 2 layers, as .*: it holds no translators_1_bias"):
        TunedLens.load(saved)


@pytest.mark.parametrize("name", ["translators_0_weight", "translators_1_bias"])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (), (1, 3, 3)])
def test_wrong_shapes(saved, name, shape):
    rewrite(saved, **{name: np.zeros(shape, dtype=np.float32)})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        TunedLens.load(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["translators_0_weight", "translators_1_bias"])
def test_nan_and_infinity(saved, name, value):
    with np.load(npz(saved)) as archive:
        array = archive[name]
    array[-1] = value
    rewrite(saved, **{name: array})
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity.*train it again"):
        TunedLens.load(saved)


def test_numbers_beyond_float32(saved):
    rewrite(saved, translators_0_bias=np.array([0.0, 1e300, 0.0]))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="translators_0_bias"):
        TunedLens.load(saved)


@pytest.mark.parametrize("array", [np.array(["a", "b", "c"]), np.array([1j, 2, 3])], ids=["text", "complex"])
def test_arrays_that_are_not_real_numbers(saved, array):
    rewrite(saved, translators_0_bias=array)
    with pytest.raises(ValueError, match="translators_0_bias"):
        TunedLens.load(saved)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"num_layers": 2}',
        '{"num_layers": "two", "hidden_dim": 3}',
        '{"num_layers": null, "hidden_dim": 3}',
        "\xff\x00",
    ],
)
def test_a_json_file_that_describes_no_lens(saved, config):
    saved.with_suffix(".json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json does not describe a lens"):
        TunedLens.load(saved)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_a_json_file_with_another_number_of_layers(saved, num_layers):
    """Too few is as wrong as too many: the rest of the archive would be dropped without a word."""
    saved.with_suffix(".json").write_text(json.dumps({"num_layers": num_layers, "hidden_dim": 3}))
    with pytest.raises(ValueError, match="layer"):
        TunedLens.load(saved)


@pytest.mark.parametrize("hidden_dim", [0, 2, 4])
def test_a_json_file_with_another_width(saved, hidden_dim):
    saved.with_suffix(".json").write_text(json.dumps({"num_layers": 2, "hidden_dim": hidden_dim}))
    with pytest.raises(ValueError, match="translators_0_weight has shape|at least one dimension|one dimension"):
        TunedLens.load(saved)
