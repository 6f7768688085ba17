"""tuned-lens's folders, read and written: files of the real torch.save, round trips, conversion, the hub."""

import json
import sys
import warnings
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import TunedLens
from metalens.compat import load_lens
from metalens.compat import tuned_lens as files
from metalens.lenses.pickled import Element, Storage, Tensor
from metalens.lenses.torch_file import _check_view, read_tensors
from support.tuned_lens_files import DATA, DIM, LAYERS, assert_same_map, lens_of

FIXTURES = ["zip-float32", "zip-bfloat16-transposed", "zip-float64-no-bias", "legacy-float16"]


def reference(layer, bias=True):
    """(A, b) as data/make_tuned_lens.py puts them into the fixtures."""

    def value(row, column):
        return ((layer * 31 + row * 7 + column * 3) % 64 - 32) / 256

    return np.array([[value(r, c) for c in range(DIM)] for r in range(DIM)]), np.array([value(r, 9) if bias else 0.0 for r in range(DIM)])


def tensors_in(folder):
    config = json.loads((folder / "config.json").read_text())
    d, count = config["d_model"], config["num_hidden_layers"]
    shapes = {f"{i}.{part}": shape for i in range(count) for part, shape in (("weight", (d, d)), ("bias", (d,)))}
    return dict(read_tensors(folder / "params.pt", lambda _: shapes))


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize("name", FIXTURES)
def test_files_of_the_real_torch_save(name):
    lens = files.load(DATA / name)
    bias = "no-bias" not in name
    assert (lens.num_layers, lens.hidden_dim, lens.variant, lens.layers) == (LAYERS, DIM, "full", [0, 1, 2])
    for layer in range(LAYERS - 1):
        a, b = reference(layer + 1, bias)
        np.testing.assert_array_equal(np.array(lens.translators[layer].weight), (np.eye(DIM) + a).astype(np.float32))
        np.testing.assert_array_equal(np.array(lens.translators[layer].bias), b.astype(np.float32))
    np.testing.assert_array_equal(np.array(lens.translators[-1].weight), np.eye(DIM))
    np.testing.assert_array_equal(np.array(lens.translators[-1].bias), np.zeros(DIM))
    a, b = reference(0, bias)
    np.testing.assert_array_equal(np.array(lens.embedding_translator.weight), (np.eye(DIM) + a).astype(np.float32))
    np.testing.assert_array_equal(np.array(lens.embedding_translator.bias), b)
    assert lens.provenance == {"model": "example/tiny", "revision": "main", "tuned_lens": {"unembed_hash": "0" * 64}}


def test_lenses_of_one_function_in_every_type_are_equal():
    lenses = [files.load(DATA / name) for name in FIXTURES if "no-bias" not in name]
    for lens in lenses[1:]:
        assert_same_map(lens, lenses[0])


def test_what_is_a_folder_of_tuned_lens(tmp_path):
    assert files.is_tuned_lens(DATA / "zip-float32")
    assert files.is_tuned_lens(str(DATA / "zip-float32" / "params.pt"))
    assert not files.is_tuned_lens(DATA)
    assert not files.is_tuned_lens(tmp_path / "nothing")
    assert not files.is_tuned_lens(DATA / "zip-float32" / "config.json")
    (tmp_path / "params.pt").write_bytes(b"")
    assert not files.is_tuned_lens(tmp_path)
    assert_same_map(files.load(DATA / "zip-float32" / "params.pt"), files.load(DATA / "zip-float32"))


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", ["zip-float32", "zip-bfloat16-transposed", "legacy-float16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_round_trip_loses_nothing(tmp_path, name, dtype):
    """The fixtures' numbers are short: every type holds them, and 1 + them."""
    files.save(files.load(DATA / name), tmp_path, dtype=dtype)
    found = tensors_in(tmp_path)
    for layer in range(LAYERS):
        for part, expected in zip(("weight", "bias"), reference(layer), strict=True):
            np.testing.assert_array_equal(found[f"{layer}.{part}"], expected)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((DATA / name / "config.json").read_text())


def test_the_config_has_the_seven_fields_of_upstream(tmp_path):
    files.save(lens_of(), tmp_path / "a" / "b", "org/model", revision="r1")
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == {
        "base_model_name_or_path": "org/model",
        "d_model": DIM,
        "num_hidden_layers": LAYERS,
        "bias": True,
        "base_model_revision": "r1",
        "unembed_hash": None,
        "lens_type": "linear_tuned_lens",
    }
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "params.pt"]


def test_what_is_known_of_one_model_is_not_said_of_another(tmp_path):
    lens = files.load(DATA / "zip-float32")
    files.save(lens, tmp_path, "another/model")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"], config["unembed_hash"]) == ("another/model", None, None)


def test_the_index_and_the_identity_are_shifted(tmp_path):
    lens = lens_of({"embedding": True})
    lens.embedding_translator.weight, lens.embedding_translator.bias = mx.eye(DIM) + 0.5, mx.full((DIM,), 2.0)
    files.save(lens, tmp_path, "m")
    found = tensors_in(tmp_path)
    assert list(found) == [f"{i}.{part}" for i in range(LAYERS) for part in ("weight", "bias")]
    np.testing.assert_array_equal(found["0.weight"], np.full((DIM, DIM), 0.5))
    np.testing.assert_array_equal(found["0.bias"], np.full(DIM, 2.0))
    for layer in range(LAYERS - 1):
        weight, bias = map(np.array, lens.dense(layer))
        np.testing.assert_array_equal(found[f"{layer + 1}.weight"], weight - np.eye(DIM, dtype=np.float32))
        np.testing.assert_array_equal(found[f"{layer + 1}.bias"], bias)
    without = lens_of()
    files.save(without, tmp_path, "m")
    assert not tensors_in(tmp_path)["0.weight"].any()
    assert files.load(tmp_path).embedding_translator is None


@pytest.mark.parametrize(
    "form", [{}, {"rank": 2}, {"bias_only": True}, {"layers": [0]}, {"rank": 1, "layers": [1]}, {"bias_only": True, "layers": []}], ids=str
)
def test_every_variant_can_be_written(tmp_path, form):
    lens = lens_of(form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.save(lens, tmp_path, "m")
    assert_same_map(files.load(tmp_path), lens, 1e-7)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_any_size(tmp_path_factory, num_layers, dim, seed):
    folder = tmp_path_factory.mktemp("lens")
    lens = lens_of({}, num_layers, dim, seed)
    files.save(lens, folder, "m")
    assert_same_map(files.load(folder), lens, 1e-7)


def test_a_last_translator_is_left_out_with_a_warning(tmp_path):
    for translator, name in ((lens_of(last=True), "both"), (lens_of(), "bias")):
        if name == "bias":
            translator.translators[-1].bias = mx.ones(DIM)
        with pytest.warns(UserWarning, match="no translator for the last block's output: that of layer 2") as caught:
            files.save(translator, tmp_path, "m")
        assert caught[0].filename == __file__
        loaded = files.load(tmp_path)
        np.testing.assert_array_equal(np.array(loaded.translators[-1].weight), np.eye(DIM))


def test_a_lens_that_knows_no_model_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="give its name .--model, in Python model_name"):
        files.save(lens_of(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    lens = lens_of()
    lens.provenance = {"model": "known/model", "revision": "r", "tuned_lens": "damaged"}
    files.save(lens, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"], config["unembed_hash"]) == ("known/model", "r", None)


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (np.inf, "float32"), (np.nan, "bfloat16")])
def test_numbers_that_the_type_cannot_hold(tmp_path, value, dtype):
    files.save(lens_of(seed=1), tmp_path, "old")
    lens = lens_of()
    lens.translators[0].bias = mx.full((DIM,), value)
    with pytest.raises(ValueError, match=f"1.bias holds numbers that {dtype} has no form for"):
        files.save(lens, tmp_path, "new", dtype=dtype)
    assert_same_map(files.load(tmp_path), lens_of(seed=1), 1e-7)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="dtype must be one of"):
        files.save(lens, tmp_path, "new", dtype="int8")


def test_a_failure_leaves_both_files_of_the_earlier_lens(tmp_path, monkeypatch):
    """A new params.pt beside an old config.json would be a lens of another model."""
    files.save(lens_of(seed=1), tmp_path, "old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metalens.compat.tuned_lens.folder.asdict", fail)
    with pytest.raises(OSError, match="No space left on device"):
        files.save(lens_of(), tmp_path, "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_same_lens_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        files.save(lens_of(), tmp_path / name, "m")
    assert (tmp_path / "a" / "params.pt").read_bytes() == (tmp_path / "b" / "params.pt").read_bytes()


def test_numbers_start_where_they_can_be_mapped(tmp_path):
    files.save(lens_of(), tmp_path, "m")
    content = (tmp_path / "params.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "params.pt") as archive:
        for entry in archive.infolist():
            name, extra = (int.from_bytes(content[entry.header_offset + at : entry.header_offset + at + 2], "little") for at in (26, 28))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0


# ---------------------------------------------------------------- views


@pytest.mark.parametrize(
    ("offset", "strides", "size", "message"),
    [
        (0, (3, 1), 6, None),
        (0, (1, 2), 6, None),
        (4, (3, 1), 10, None),
        (0, (5, 1), 8, None),
        (0, (3, 1), 5, "beyond"),
        (1, (3, 1), 6, "beyond"),
        (10**30, (3, 1), 6, "beyond"),
        (0, (10**30, 1), 6, "beyond"),
        (0, (0, 0), 6, "overlap"),
        (0, (0, 1), 6, "overlap"),
        (0, (3, 0), 6, "overlap"),
        (0, (2, 1), 6, "overlap"),
        (0, (1, 1), 6, "overlap"),
    ],
)
def test_views_stay_within_their_storage_and_use_no_number_twice(offset, strides, size, message):
    tensor = Tensor(Storage(Element.FLOAT32, "0", size), offset, (2, 3), strides)
    if message is None:
        _check_view("x", tensor, (2, 3))
    else:
        with pytest.raises(ValueError, match=message):
            _check_view("x", tensor, (2, 3))


# ---------------------------------------------------------------- conversion


def test_from_ours_to_theirs_and_back(tmp_path):
    lens = lens_of({"embedding": True})
    lens.embedding_translator.weight, lens.embedding_translator.bias = mx.eye(DIM) + 0.25, mx.full((DIM,), 0.5)
    lens.provenance = {"model": "org/model", "tokens": 5}
    lens.save(tmp_path / "ours")
    assert files.convert(tmp_path / "ours", tmp_path / "theirs") == (tmp_path / "theirs" / "params.pt", tmp_path / "theirs" / "config.json")
    assert files.convert(tmp_path / "theirs", tmp_path / "back.npz") == (tmp_path / "back.npz", tmp_path / "back.json")
    back = TunedLens.load(tmp_path / "back")
    assert_same_map(back, lens, 1e-7)
    assert back.provenance == {"model": "org/model"}
    np.testing.assert_array_equal(np.array(back.embedding_translator.weight), np.array(lens.embedding_translator.weight))


def test_from_theirs_to_ours_and_back_loses_nothing(tmp_path):
    files.convert(DATA / "zip-float32", tmp_path / "ours")
    files.convert(tmp_path / "ours.json", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "config.json").exists()
    for name, array in tensors_in(tmp_path / "theirs").items():
        np.testing.assert_array_equal(array, tensors_in(DATA / "zip-float32")[name])
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == json.loads((DATA / "zip-float32" / "config.json").read_text())


def test_one_function_reads_both_formats(tmp_path):
    lens = lens_of()
    lens.save(tmp_path / "ours")
    for path in (tmp_path / "ours", str(tmp_path / "ours.npz"), tmp_path / "ours.json"):
        assert_same_map(load_lens(path), lens)
    expected = files.load(DATA / "zip-float32")
    for path in (DATA / "zip-float32", str(DATA / "zip-float32"), DATA / "zip-float32" / "params.pt"):
        assert_same_map(load_lens(path), expected)
        assert load_lens(path).provenance == expected.provenance


def test_a_path_without_a_lens_of_either_format(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"No lens at .*: neither .*\.npz and .*\.json, nor a folder with params.pt and config.json"):
            load_lens(path)
    lens_of().save(tmp_path / "half")
    (tmp_path / "half.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"half\.json is missing"):
        load_lens(tmp_path / "half")


def test_a_pair_goes_before_a_folder_of_the_same_name(tmp_path):
    lens_of(seed=1).save(tmp_path / "x")
    files.save(lens_of(seed=2), tmp_path / "x", "m")
    assert_same_map(load_lens(tmp_path / "x"), lens_of(seed=1))
    assert_same_map(load_lens(tmp_path / "x" / "params.pt"), lens_of(seed=2), 1e-7)


def test_a_variant_becomes_what_mlxterp_reads(tmp_path):
    lens = lens_of({"rank": 2, "layers": [1]}, last=True)
    lens.save(tmp_path / "low")
    files.convert(tmp_path / "low", tmp_path / "full", to="metalens", model_name="org/model")
    full = TunedLens.load(tmp_path / "full")
    assert (full.variant, full.layers, full.provenance) == ("full", [0, 1, 2], {"model": "org/model"})
    assert json.loads((tmp_path / "full.json").read_text())["format_version"] == 1
    assert_same_map(full, lens)


def test_conversion_can_name_the_model_and_the_type(tmp_path):
    lens_of().save(tmp_path / "ours")
    with pytest.raises(ValueError, match="give its name .--model, in Python model_name"):
        files.convert(tmp_path / "ours", tmp_path / "theirs")
    files.convert(tmp_path / "ours", tmp_path / "theirs", model_name="m", dtype="bfloat16")
    assert_same_map(files.load(tmp_path / "theirs"), lens_of(), 1e-2)
    files.convert(DATA / "zip-float32", tmp_path / "again", to="tuned-lens", model_name="other")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_model_name_or_path"] == "other"


def test_converting_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"neither nothing\.npz and nothing\.json, nor a folder with params\.pt and config\.json"):
        files.convert(tmp_path / "nothing", tmp_path / "x")
    lens_of().save(tmp_path / "half")
    (tmp_path / "half.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"half\.npz is missing"):
        files.convert(tmp_path / "half", tmp_path / "x")


# ---------------------------------------------------------------- torch itself


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="cross-checks with torch need the bench extra")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_we_write(torch, tmp_path, dtype, mmap):
    lens = lens_of()
    files.save(lens, tmp_path, "m", dtype=dtype)
    state = torch.load(tmp_path / "params.pt", weights_only=True, mmap=mmap)
    layers = torch.nn.ModuleList(torch.nn.Linear(DIM, DIM, dtype=getattr(torch, dtype)) for _ in range(LAYERS))
    layers.load_state_dict(state)
    h = np.random.default_rng(1).normal(size=(6, DIM)).astype(np.float32)
    for layer in range(LAYERS - 1):
        upstream = torch.tensor(h) + layers[layer + 1].float()(torch.tensor(h))
        tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(upstream.detach().numpy(), np.array(lens(mx.array(h), layer)), atol=tolerance, rtol=0)
    assert not layers[0].weight.any()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slices of one storage", "no metadata"])
def test_we_read_what_torch_writes(torch, tmp_path, zipped, dtype, layout):
    layers = torch.nn.ModuleList(torch.nn.Linear(DIM, DIM, dtype=getattr(torch, dtype)) for _ in range(LAYERS))
    state = layers.state_dict()
    if layout == "transposed":
        state = {name: tensor.mT if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    elif layout == "slices of one storage":
        whole = torch.randn(LAYERS, 2 * DIM, 2 * DIM).to(getattr(torch, dtype))
        state = {
            f"{i}.{part}": whole[i, 1, :DIM] if part == "bias" else whole[i, 2 : 2 + DIM, 3 : 3 + DIM]
            for i in range(LAYERS)
            for part in ("weight", "bias")
        }
    elif layout == "no metadata":
        state = dict(state)
    torch.save(state, tmp_path / "params.pt", _use_new_zipfile_serialization=zipped)
    config = {"base_model_name_or_path": "m", "d_model": DIM, "num_hidden_layers": LAYERS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lens = files.load(tmp_path)
    for layer in range(LAYERS - 1):
        weight, bias = (state[f"{layer + 1}.{part}"].detach().double().numpy() for part in ("weight", "bias"))
        np.testing.assert_allclose(np.array(lens.translators[layer].weight), np.eye(DIM) + weight, atol=2e-7)
        np.testing.assert_array_equal(np.array(lens.translators[layer].bias), bias.astype(np.float32))
