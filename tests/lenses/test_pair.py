"""A lens is one thing: its two files are bound to each other, are of a lens, and hold finite numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile

import mlx.core as mx
import pytest

from metalens import TunedLens
from metalens.lenses.lens_file import is_lens_archive, is_lens_description
from metalens.utils.errors import InvalidValueError
from metalens.utils.outputs import NotOursError


def a_lens(seed=0, **options):
    lens = TunedLens(2, 3, **options)
    for translator in (lens.translators[i] for i in lens.layers):
        translator.bias = mx.random.normal((3,), key=mx.random.key(seed))
    lens.provenance = {"model": f"model {seed}", "tokens": 1000}
    return lens


def test_files_of_two_lenses_do_not_make_a_third(tmp_path):
    a_lens(0).save(tmp_path / "a")
    a_lens(1).save(tmp_path / "b")
    shutil.copy(tmp_path / "b.npz", tmp_path / "a.npz")
    with pytest.raises(InvalidValueError, match=r"a\.npz and .*a\.json do not belong together"):
        TunedLens.load(tmp_path / "a")
    TunedLens.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["x.npz", "x.json"])
def test_a_save_that_is_killed_at_a_move_is_noticed(tmp_path, name):
    """Before the first move the old pair is whole, between the two moves the pair is refused."""
    a_lens(0).save(tmp_path / "x")
    script = f"""
import os, pathlib, signal
import mlx.core as mx
from metalens import TunedLens
move = pathlib.Path.replace
def replace(self, target):
    if target.name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return move(self, target)
pathlib.Path.replace = replace
lens = TunedLens(2, 3)
lens.translators[0].bias = mx.ones(3)
lens.save({str(tmp_path / "x")!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    if name == "x.npz":
        assert TunedLens.load(tmp_path / "x").provenance == {"model": "model 0", "tokens": 1000}
    else:
        with pytest.raises(InvalidValueError, match="do not belong together"):
            TunedLens.load(tmp_path / "x")
    a_lens(1).save(tmp_path / "x")
    assert TunedLens.load(tmp_path / "x").provenance["model"] == "model 1"


def test_every_flipped_bit_of_the_description_is_an_error_or_a_warning(tmp_path):
    a_lens().save(tmp_path / "x")
    before = TunedLens.load(tmp_path / "x").provenance
    text = (tmp_path / "x.json").read_bytes()
    for bit in range(0, 8 * len(text), 7):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.json").write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read = TunedLens.load(tmp_path / "x")
            except InvalidValueError:
                continue
        assert caught or read.provenance == before, bytes(damaged)


def test_a_pair_without_checksums_loads_as_before(tmp_path):
    a_lens().save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text())
    del described["checksums"]
    (tmp_path / "x.json").write_text(json.dumps(described))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TunedLens.load(tmp_path / "x").provenance == a_lens().provenance


def test_the_description_may_hold_any_unicode(run_python, tmp_path):
    TunedLens(1, 2).save(tmp_path / "x")
    text = (tmp_path / "x.json").read_text()
    described = {key: value for key, value in json.loads(text).items() if key != "checksums"}
    (tmp_path / "x.json").write_text(json.dumps(described | {"origin": {"model": "Zwölf"}}, ensure_ascii=False), encoding="utf-8")
    script = f"from metalens import TunedLens; print(ascii(TunedLens.load({str(tmp_path / 'x')!r}).provenance['model']))"
    assert run_python(script, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").strip() == "'Zw\\xf6lf'"


@pytest.mark.parametrize("change", [{"num_layers": "2"}, {"num_layers": 2.9}, {"hidden_dim": True}, {"format_version": -5}, {"format_version": True}])
def test_numbers_of_another_type_are_refused(tmp_path, change):
    a_lens().save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text()) | change
    (tmp_path / "x.json").write_text(json.dumps(described))
    with pytest.raises(InvalidValueError, match=r"does not describe a lens|format_version"):
        TunedLens.load(tmp_path / "x")


def test_an_array_that_is_stored_twice_is_refused(tmp_path):
    """NumPy would take the last one, and another reader the first. There are no checksums in a lens of mlxterp."""
    a_lens().save(tmp_path / "x")
    described = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({key: value for key, value in described.items() if key != "checksums"}))
    TunedLens.load(tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("translators_0_bias.npy", archive.read("translators_1_bias.npy"))
    with pytest.raises(InvalidValueError, match="holds an array twice"):
        TunedLens.load(tmp_path / "x")


def test_a_huge_description_is_not_read(tmp_path):
    a_lens().save(tmp_path / "x")
    with (tmp_path / "x.json").open("r+b") as file:
        file.truncate(1 << 32)  # a sparse file
    with pytest.raises(InvalidValueError, match="it has 4294967296 bytes"):
        TunedLens.load(tmp_path / "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lens_that_is_not_finite_is_not_saved(tmp_path, value):
    a_lens(0).save(tmp_path / "x")
    spoiled = a_lens(1)
    spoiled.translators[1].weight = mx.full((3, 3), value)
    with pytest.raises(InvalidValueError, match=r"layer 1 holds NaN or infinity.*stays as it was"):
        spoiled.save(tmp_path / "x")
    assert TunedLens.load(tmp_path / "x").provenance["model"] == "model 0"
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.npz"]


@pytest.mark.parametrize("name", ["x.npz", "x.json"])
@pytest.mark.parametrize("content", [b'{"model_type": "llama"}', b"text", b"[1, 2]", b"\xff\xfe"])
def test_a_file_that_is_not_a_lens_is_not_replaced(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotOursError, match=rf"{name.replace('.', '[.]')} exists and is not"):
        a_lens().save(tmp_path / "x")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content
    a_lens().save(tmp_path / "x", force=True)
    assert TunedLens.load(tmp_path / "x").provenance["model"] == "model 0"


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"bias_only": True}, {"layers": [1]}])
def test_lenses_are_recognized(tmp_path, options):
    a_lens(**options).save(tmp_path / "x")
    assert is_lens_archive(tmp_path / "x.npz")
    assert is_lens_description(tmp_path / "x.json")
    a_lens().save(tmp_path / "x")


def test_an_empty_file_may_be_replaced(tmp_path):
    (tmp_path / "x.json").touch()
    a_lens().save(tmp_path / "x")


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    a_lens().save("~/x")
    assert os.listdir(tmp_path) == ["home"]
    TunedLens.load("~/x")


def test_mlx_s_random_state_is_the_users(tmp_path):
    TunedLens(2, 3, rank=1).save(tmp_path / "low")
    a_lens().save(tmp_path / "x")
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    TunedLens(2, 3).to_full()
    TunedLens.load(tmp_path / "x")
    TunedLens.load(tmp_path / "low").to_full()
    assert mx.random.uniform().item() == expected
