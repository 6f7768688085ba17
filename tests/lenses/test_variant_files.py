"""The files of low-rank and bias-only lenses, and of lenses of some layers."""

import contextlib
import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalens import TunedLens
from metalens.lenses.lens_file import MAX_LAYERS
from metalens.lenses.translators import VARIANTS, parameters_of
from support.lenses import FORMS, assert_same, each_form, randomized


@each_form
def test_saving_and_loading_every_form(tmp_path, form):
    lens = randomized(form)
    lens.save(tmp_path / "x")
    assert_same(TunedLens.load(tmp_path / "x"), lens)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_saving_and_loading_is_exact(tmp_path_factory, num_layers, dim, data):
    form = {"layers": data.draw(st.none() | st.sets(st.integers(0, num_layers - 1))), "embedding": data.draw(st.booleans())}
    form |= data.draw(st.sampled_from([{}, {"bias_only": True}, {"rank": data.draw(st.integers(1, dim))}]))
    lens = randomized(form, num_layers, dim, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        lens.provenance = data.draw(st.dictionaries(st.text(), st.none() | st.integers(-9, 9) | st.text() | st.lists(st.booleans()), max_size=3))
    path = tmp_path_factory.mktemp("lens") / "x"
    lens.save(path)
    assert_same(TunedLens.load(path), lens)


def test_the_files_of_a_variant(tmp_path):
    TunedLens(4, 3, rank=2, layers=[1, 3]).save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text())
    assert set(described.pop("checksums")) == {"weights", "description"}
    assert described == {
        "num_layers": 4,
        "hidden_dim": 3,
        "format_version": 2,
        "variant": "low-rank",
        "rank": 2,
        "layers": [1, 3],
    }
    with np.load(tmp_path / "x.npz") as archive:
        assert {name: array.shape for name, array in archive.items()} == {
            "translators_1_down": (2, 3),
            "translators_1_up": (3, 2),
            "translators_1_bias": (3,),
            "translators_3_down": (2, 3),
            "translators_3_up": (3, 2),
            "translators_3_bias": (3,),
        }


def test_a_full_lens_with_a_provenance_stays_in_format_1(tmp_path):
    """mlxterp reads num_layers, hidden_dim and the translators, and looks at nothing else."""
    lens = randomized({})
    lens.provenance = {"model": "m", "tokens": 3}
    lens.save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text())
    assert set(described.pop("checksums")) == {"weights", "description"}
    assert described == {
        "num_layers": 3,
        "hidden_dim": 5,
        "format_version": 1,
        "origin": {"model": "m", "tokens": 3},
    }
    weights = mx.load(str(tmp_path / "x.npz"))
    for i, translator in enumerate(lens.translators):
        assert mx.array_equal(weights[f"translators_{i}_weight"], translator.weight)
        assert mx.array_equal(weights[f"translators_{i}_bias"], translator.bias)


def test_a_provenance_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    for value in (mx.zeros(3), {1, 2}, float("nan"), b"x"):
        lens = randomized({})
        lens.provenance = {"training": {"x": value}}
        with pytest.raises(ValueError, match=r"JSON"):
            lens.save(tmp_path / "x")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 4},
        {"format_version": "2"},
        {"format_version": None},
        {"variant": "cubic"},
        {"variant": ["full"]},
        {"variant": None},
        {"variant": "full"},
        {"variant": "bias"},
        {"rank": None},
        {"rank": 1.0},
        {"rank": True},
        {"rank": 1},
        {"rank": 3},
        {"rank": -2},
        {"rank": 10**30},
        {"layers": 1},
        {"layers": [1]},
        {"layers": [1, "3"]},
        {"layers": [1, 4]},
        {"layers": [-1, 3]},
        {"layers": [1, 3, 2]},
        {"layers": None},
        {"num_layers": 3},
        {"num_layers": 0},
        {"num_layers": MAX_LAYERS + 1},
        {"num_layers": 10**30},
        {"num_layers": float("inf")},
        {"hidden_dim": 4},
        {"hidden_dim": 10**12},
        {"hidden_dim": -3},
        {"origin": []},
        {"origin": "x"},
    ],
    ids=str,
)
def test_a_description_that_the_arrays_do_not_bear_out(tmp_path, change):
    randomized({"rank": 2, "layers": [1, 3]}, 4, 3).save(tmp_path / "x")
    config = json.loads((tmp_path / "x.json").read_text()) | change
    (tmp_path / "x.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"x\.(json|npz)|at least one|rank must be|layers must be"):
        TunedLens.load(tmp_path / "x")


@pytest.fixture(scope="module")
def file_bytes(tmp_path_factory):
    """(folder, {suffix: bytes}) of a small saved variant."""
    folder = tmp_path_factory.mktemp("bytes")
    lens = randomized({"rank": 1, "layers": [1]}, 2, 2)
    lens.provenance = {"model": "m"}
    lens.save(folder / "x")
    return folder, {suffix: (folder / f"x{suffix}").read_bytes() for suffix in (".npz", ".json")}


@settings(max_examples=400)
@given(st.sampled_from([".npz", ".json"]), st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["set", "cut", "insert"]))
def test_damaged_bytes_give_a_lens_or_a_value_error(file_bytes, suffix, position, byte, how):
    folder, files = file_bytes
    for name, content in files.items():
        (folder / f"x{name}").write_bytes(content)
    content = files[suffix]
    position %= len(content)
    damaged = {"set": bytes([byte]) + content[position + 1 :], "cut": b"", "insert": bytes([byte]) + content[position:]}[how]
    (folder / f"x{suffix}").write_bytes(content[:position] + damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError):
            assert isinstance(TunedLens.load(folder / "x"), TunedLens)


def test_every_variant_says_what_it_stores():
    for form in FORMS.values():
        lens = TunedLens(3, 5, **form)
        for layer in lens.layers:
            assert set(parameters_of(lens.translators[layer])) == set(VARIANTS[lens.variant])
