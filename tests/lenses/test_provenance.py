"""A lens remembers the model that it was trained for, and says so when it is used on another."""

import importlib
import json
import warnings
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens, accelerate
from metalens.lenses.lens_file import lens_files
from metalens.lenses.provenance import check_provenance, head_hash, provenance_of
from metalens.models.unembed import NO_NORM, Unembed
from metalens.ops import Head, Weight
from support.mocks import MockModel


def head(rows=6, seed=0, **settings):
    return Head(Weight(mx.array(np.random.default_rng(seed).normal(size=(rows, 32)).astype(np.float32))), **settings)


def quantized(values, bits=4, group_size=32):
    return Head(Weight(*mx.quantize(values, group_size, bits), group_size, bits))


def unembed_of(found):
    return Unembed(NO_NORM, found, {}, False, found.vocab_size)


def lens_for(found, model=None, **facts):
    lens = TunedLens(1, 32)
    lens.provenance = provenance_of(unembed_of(found), model, **facts)
    return lens


def warned(lens, found, model=None):
    """The one warning's text, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_provenance(lens, unembed_of(found), model)
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    assert len(caught) <= 1
    return str(caught[0].message) if caught else None


# ---------------------------------------------------------------- the hash


def test_the_hash_is_stable():
    """Of these bytes on every machine: a change of the recipe would disown every lens that was ever saved."""
    found = Head(Weight(mx.arange(6, dtype=mx.float32).reshape(3, 2)), mx.ones(3), 0.5, 30.0)
    assert head_hash(found) == "sha256:4df809f730499ae10d9fcdc685368515865d9ada72a2e7f5544bb2223d38c3a3"
    assert head_hash(head()) == head_hash(head())


def test_everything_that_makes_the_logits_is_in_the_hash():
    values = head().weight.values
    packed = mx.quantize(values, 32, 4)
    mode = Weight(*packed, 32, 4)
    changed = mx.array(np.array(values))
    changed[-1, -1] += 1e-6
    heads = [
        Head(Weight(values)),
        Head(Weight(changed)),
        Head(Weight(values.reshape(-1, 16))),
        Head(Weight(values.astype(mx.float16))),
        Head(Weight(values.astype(mx.bfloat16))),
        Head(Weight(values), mx.zeros(6)),
        Head(Weight(values), mx.ones(6)),
        Head(Weight(values), scale=2.0),
        Head(Weight(values), softcap=30.0),
        Head(Weight(values), used_rows=5),
        Head(mode),
        Head(Weight(packed[0], packed[1] * 2, packed[2], 32, 4)),
        Head(Weight(packed[0], packed[1], packed[2] + 1, 32, 4)),
        quantized(values, 8),
    ]
    hashes = [head_hash(each) for each in heads]
    assert len(set(hashes)) == len(heads)
    assert head_hash(Head(Weight(mx.quantize(values, 32, 4)[0], packed[1], packed[2], 32, 4))) == head_hash(Head(mode))


def test_heads_larger_than_one_piece_are_read_to_the_end():
    values = mx.zeros(((1 << 24) + 64) // 32 * 32).reshape(-1, 32).astype(mx.bfloat16)
    other = mx.array(values)
    other[-1, -1] = 1
    assert head_hash(Head(Weight(values))) != head_hash(Head(Weight(other)))


def test_a_slice_hashes_like_a_copy():
    values = head(12).weight.values
    assert head_hash(Head(Weight(values[::2]))) == head_hash(Head(Weight(mx.array(np.array(values[::2])))))


def test_accelerating_a_model_leaves_its_hash(make_llama):
    before = head_hash(InterpretableModel(make_llama()).unembed.head)
    model = InterpretableModel(make_llama())
    accelerate(model.model)
    assert head_hash(model.unembed.head) == before


# ---------------------------------------------------------------- the provenance


def test_what_a_provenance_holds(tmp_path):
    lens = lens_for(head(), "org/model", revision="abc", tokens=1000, recipe="paper", training={"num_steps": 5})
    assert lens.provenance == {
        "metalens": version("metalens"),
        "head": head_hash(head()),
        "quantization": "float32",
        "model": "org/model",
        "revision": "abc",
        "tokens": 1000,
        "recipe": "paper",
        "training": {"num_steps": 5},
    }
    assert set(lens_for(head()).provenance) == {"metalens", "head", "quantization"}
    assert lens_for(quantized(head().weight.values)).provenance["quantization"] == "affine 4-bit, groups of 32"
    lens.save(tmp_path / "x")
    assert json.loads((tmp_path / "x.json").read_text())["origin"] == lens.provenance
    assert TunedLens.load(tmp_path / "x").provenance == lens.provenance


def test_the_old_name_of_the_provenance():
    lens = TunedLens(1, 32)
    with pytest.warns(DeprecationWarning, match=r"TunedLens.origin is now TunedLens.provenance") as found:
        lens.origin = {"model": "m"}
    assert found[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="is now") as found:
        assert lens.origin is lens.provenance
    assert found[0].filename == __file__
    assert lens.provenance == {"model": "m"}
    assert "origin" not in lens


def test_the_old_names_of_functions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = importlib.import_module("metalens.lens")
    assert (old.origin_of, old.check_origin, old.head_hash) == (provenance_of, check_provenance, head_hash)
    assert (old.TunedLens, old.lens_files) == (TunedLens, lens_files)


def test_files_of_the_first_version_spell_quantization_otherwise(tmp_path):
    lens = lens_for(quantized(head().weight.values), "m")
    lens.save(tmp_path / "x")
    now = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(now.replace('"quantization"', '"quantisation"'))
    assert TunedLens.load(tmp_path / "x").provenance == lens.provenance
    assert '"quantisation"' not in now


def test_the_warning_points_at_the_users_line():
    with pytest.warns(UserWarning, match="another model") as found:
        check_provenance(lens_for(head()), unembed_of(head(seed=1)))
    assert found[0].filename == __file__


def test_a_lens_without_a_memory_fits_everything():
    assert TunedLens(1, 32).provenance == {}
    assert warned(TunedLens(1, 32), head(), "a/b") is None


def test_the_same_head_is_the_same_model_whatever_its_name():
    lens = lens_for(head(), "org/model")
    for name in ("org/model", "/elsewhere/copy", None):
        assert warned(lens, head(), name) is None


def test_another_head_is_another_model_whatever_its_name():
    lens = lens_for(head(), "org/model")
    message = warned(lens, head(seed=1), "org/model")
    assert message == (
        "The lens remembers another model: the weights of the output head differ; "
        "its readings may be off, so measure it on this model with evaluate(), or train one for it."
    )
    assert "trained for 'org/model', and this is 'org/other'; the weights" in warned(lens, head(seed=1), "org/other")
    assert "the weights of the output head differ" in warned(lens, head(seed=1))


def test_another_quantization_is_named():
    lens = lens_for(quantized(head().weight.values, 4), "m")
    assert "its model's head was affine 4-bit, groups of 32, and this one is affine 8-bit, groups of 32;" in warned(
        lens, quantized(head().weight.values, 8), "m"
    )


@pytest.mark.parametrize(
    ("remembered", "used", "same"),
    [
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m", True),
        ("EleutherAI/pythia-70m", "/models/Pythia-70m/", True),
        ("EleutherAI/pythia-70m", "C:\\models\\pythia-70m", True),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-160m", False),
        ("EleutherAI/pythia-70m", None, True),
        (None, "x", True),
        (3, "x", True),
    ],
)
def test_without_a_head_names_decide(remembered, used, same):
    lens = TunedLens(1, 32)
    lens.provenance = {"model": remembered}
    message = warned(lens, head(), used)
    assert (message is None) == same
    if not same:
        assert f"trained for {remembered!r}, and this is {used!r}" in message


def test_a_damaged_provenance_is_no_error():
    lens = TunedLens(1, 32)
    lens.provenance = {"head": ["?"], "quantization": {"bits": 4}, "model": None}
    assert "output head" in warned(lens, head()) or "head was" in warned(lens, head())


def test_the_head_is_read_once(monkeypatch):
    calls = []
    monkeypatch.setattr("metalens.lenses.provenance.head_hash", lambda found: calls.append(1) or "sha256:x")
    unembed, lens = unembed_of(head()), TunedLens(1, 32)
    lens.provenance = {"head": "sha256:x"}
    for _ in range(3):
        check_provenance(lens, unembed)
    assert len(calls) == 1


# ---------------------------------------------------------------- in a model


def test_a_model_warns_about_a_lens_of_another(tmp_path):
    mine, other = InterpretableModel(MockModel(seed=0)), InterpretableModel(MockModel(seed=1))
    lens = TunedLens(len(mine.layers), mine.unembed.hidden_dim)
    lens.provenance = provenance_of(mine.unembed, "mine")
    lens.save(tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.load_tuned_lens(tmp_path / "x")
        mine.tuned_lens([1, 2], lens)
    for use in (lambda: other.load_tuned_lens(tmp_path / "x"), lambda: other.tuned_lens([1, 2], lens)):
        with pytest.warns(UserWarning, match="The lens remembers another model"):
            use()


def test_a_fine_tuned_model_with_the_same_head_is_another_model(make_llama, tmp_path):
    """Base and instruct models may share a head: the hash of all weights tells them apart."""
    model = InterpretableModel(make_llama())
    lens = model.train_tuned_lens([list(range(40))], 1, max_seq_len=16, save_path=tmp_path / "lens", verbose=False)
    assert lens.provenance["weights"] == model.weights_hash
    loaded = TunedLens.load(tmp_path / "lens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read([1, 2], loaded)
    block = model.model.model.layers[1].mlp.down_proj
    block.scales = block.scales * 1.01
    with pytest.warns(UserWarning, match="its head is the same, but other weights differ"):
        model.read([1, 2], loaded)
    del loaded.provenance["weights"]  # a lens of version 0.1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read([1, 2], loaded)


def test_an_empty_name_is_no_name():
    lens = TunedLens(1, 32)
    lens.provenance = {"model": ""}  # tuned-lens saves this for a model in memory
    assert warned(lens, head(), "org/model") is None


def test_a_lens_from_python_remembers_its_model(make_llama):
    lens = InterpretableModel(make_llama()).train_tuned_lens([list(range(40))], 1, max_seq_len=16, verbose=False)
    with pytest.warns(UserWarning, match="remembers another model: the weights of the output head differ"):
        InterpretableModel(make_llama(seed=1)).tuned_lens([1, 2], lens)
