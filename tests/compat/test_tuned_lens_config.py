"""The config.json of tuned-lens's folders: missing, unknown and wrong keys."""

import json

import pytest

from metalens.compat import tuned_lens as files
from support.tuned_lens_files import DATA


@pytest.fixture
def lens_folder(tmp_path):
    for name in ("params.pt", "config.json"):
        (tmp_path / name).write_bytes((DATA / "zip-float32" / name).read_bytes())
    return tmp_path


def configure(lens_folder, remove=(), **changes):
    config = json.loads((lens_folder / "config.json").read_text()) | changes
    (lens_folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def test_unknown_keys_are_dropped_with_a_warning(lens_folder):
    configure(lens_folder, color="blue", extra=[1])
    with pytest.warns(UserWarning, match=r"config\.json: ignoring color, extra"):
        lens = files.load(lens_folder)
    assert "color" not in json.dumps(lens.provenance)


def test_keys_with_defaults_may_be_missing(lens_folder):
    configure(lens_folder, remove=("bias", "base_model_revision", "unembed_hash", "lens_type"))
    assert files.load(lens_folder).provenance == {"model": "example/tiny"}


@pytest.mark.parametrize("key", ["base_model_name_or_path", "d_model", "num_hidden_layers"])
def test_keys_without_defaults_may_not(lens_folder, key):
    configure(lens_folder, remove=(key,))
    with pytest.raises(ValueError, match=r"config\.json does not describe a lens of tuned-lens.*" + key):
        files.load(lens_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 0},
        {"d_model": -4},
        {"d_model": 4.0},
        {"d_model": "4"},
        {"d_model": True},
        {"d_model": None},
        {"d_model": [[[4]]]},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "3"},
        {"bias": 1},
        {"bias": None},
        {"lens_type": "quadratic"},
        {"lens_type": None},
        {"base_model_name_or_path": 3},
        {"base_model_name_or_path": None},
        {"base_model_revision": 1},
        {"unembed_hash": {}},
    ],
    ids=str,
)
def test_config_values_of_the_wrong_kind(lens_folder, change):
    configure(lens_folder, **change)
    with pytest.raises(ValueError, match=r"config\.json does not describe a lens of tuned-lens"):
        files.load(lens_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe{}", b"[" * 200_000, b"1" * 5000, b" " * ((1 << 20) + 1)])
def test_a_config_that_is_no_config(lens_folder, content):
    (lens_folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json does not describe a lens of tuned-lens"):
        files.load(lens_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "2.bias, 2.weight"),
        ({"num_hidden_layers": 4}, "3.bias, 3.weight"),
        ({"num_hidden_layers": 10**15}, "missing or unexpected"),
        ({"d_model": 5}, r"0.weight has shape \(4, 4\)"),
        ({"d_model": 10**9}, r"0.weight has shape \(4, 4\)"),
        ({"bias": False}, "0.bias"),
    ],
)
def test_a_config_that_its_tensors_do_not_bear_out(lens_folder, change, message):
    configure(lens_folder, **change)
    with pytest.raises(ValueError, match=rf"params\.pt is not a tuned lens file, or is damaged: .*{message}"):
        files.load(lens_folder)
