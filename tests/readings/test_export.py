"""Trajectories as JSON, safetensors and tables: whole round trips, and damaged or foreign files."""

import base64
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, Trajectory
from metalens.readings import STATISTICS
from metalens.utils.errors import InvalidValueError
from support.full_disk import largest_file
from support.mocks import MockModel, WordTokenizer, random_lens

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def trajectory():
    model = InterpretableModel(MockModel(), WordTokenizer())
    return model.trajectory(IDS, random_lens(), embedding=True, top_k=3, tokens=["w7", 5], anti_targets=[7, -1, 8, 9, 10])


def assert_equal(ours, theirs, tolerance=1e-6):
    for name, values in theirs.to_numpy().items():
        np.testing.assert_allclose(ours.to_numpy()[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
        assert ours.to_numpy()[name].dtype == values.dtype
    for name, values in theirs.model.statistics().items():
        np.testing.assert_allclose(getattr(ours.model, name), values, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.top_logits, theirs.top_logits, rtol=1e-4, atol=1e-2 if tolerance > 1e-5 else 1e-4)
    for name in ("layers", "untranslated", "chosen_ids", "texts", "first_position", "lens", "mask_input", "model_name", "num_layers", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("token_ids", "target_ids", "anti_target_ids"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.source is None


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_file_holds_everything(trajectory, tmp_path, suffix):
    path = tmp_path / "new" / f"t.{suffix}"
    trajectory.save(path)
    assert_equal(Trajectory.load(path), trajectory)
    part = trajectory.select(layers=[1], positions=-1)
    part.save(path)  # a trajectory replaces a trajectory
    assert_equal(Trajectory.load(path), part)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_probabilities_that_float32_cannot_hold(trajectory, tmp_path, suffix):
    # exp(-150) is 0 and exp(-1e-9) is 1 in float32.
    log_probs = np.resize(np.array([-150, -1e-9, -np.inf], np.float32), trajectory.chosen_log_probs.shape)
    lse = np.zeros_like(trajectory.lse)
    t = replace(trajectory, lse=lse, chosen_log_probs=log_probs, top_logits=np.resize(log_probs, trajectory.top_logits.shape))
    t.save(tmp_path / f"t.{suffix}")
    again = Trajectory.load(tmp_path / f"t.{suffix}")
    np.testing.assert_array_equal(again.chosen_log_probs, log_probs)
    np.testing.assert_array_equal(again.top_logits, t.top_logits)


def test_without_targets_chosen_tokens_and_comparison(tmp_path):
    t = InterpretableModel(MockModel(), WordTokenizer()).trajectory(IDS, mask_input=True, compare=False)
    for name in ("t.json", "t.safetensors"):
        t.save(tmp_path / name)
        assert_equal(Trajectory.load(tmp_path / name), t)


def test_the_form_of_the_document(trajectory):
    data = trajectory.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert list(data["statistics"]) == list(STATISTICS)
    kl = data["statistics"]["kl"]
    assert (kl["label"], kl["unit"], kl["values"]["dtype"], kl["values"]["shape"], kl["model"]["shape"]) == (
        "KL(model || lens)", "nats", "float32", [4, 5], [5],
    )  # fmt: skip
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(kl["values"]["base64"]), "<f4").reshape(4, 5), trajectory.kl)
    assert data["top"]["ids"]["dtype"] == "uint32"
    assert data["layers"][0] == {"layer": "embedding", "label": "embedding*", "translated": False}
    assert (data["token_ids"], data["target_ids"]) == (IDS, [1, 4, 1, 5, -1])
    assert data["chosen"]["ids"] == [7, 5]
    assert data["chosen"]["log_probabilities"]["shape"] == [2, 4, 5]
    ids, display = data["vocabulary"]["ids"], data["vocabulary"]["display"]
    assert ids == sorted(set(ids))
    assert display[ids.index(3)] == "w3"


def test_the_compact_form_has_half_the_floats(trajectory):
    small = trajectory.to_json(compact=True)
    assert small["statistics"]["kl"]["values"]["dtype"] == "float16"
    assert small["statistics"]["rank"]["values"]["dtype"] == "int32"
    assert len(json.dumps(small)) < len(json.dumps(trajectory.to_json()))
    assert_equal(Trajectory.from_json(small), trajectory, 1e-2)


def test_hostile_tokens_are_text(trajectory):
    data = json.loads(json.dumps(trajectory.to_json()))
    data["vocabulary"]["text"][0] = "</script><script>\x1b[31m\u202e"
    t = Trajectory.from_json(data)
    assert t.to_json()["vocabulary"]["display"][0] == "</script><script><0x1B>[31m<U+202E>"


DAMAGE = [
    (lambda d: d.clear(), "no trajectory"),
    (lambda d: d.update(format="x"), "no trajectory"),
    (lambda d: d.update(version=1), "version 1; this metalens reads version 2"),
    (lambda d: d.update(layers=d["layers"][:2]), "damaged"),
    (lambda d: d.update(token_ids=[1]), "damaged"),
    (lambda d: d.update(statistics=[]), "damaged"),
    (lambda d: d["statistics"]["entropy"].pop("values"), "damaged"),
    (lambda d: d["lse"]["values"].update(base64="!"), "damaged"),
    (lambda d: d["lse"]["values"].update(dtype="object"), "damaged"),
    (lambda d: d["lse"]["values"].update(shape=[10**30]), "damaged"),
    (lambda d: d["vocabulary"]["ids"].pop(), "damaged"),
    (lambda d: d["chosen"].update(ids=[1, 2, 3]), "damaged"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_documents(trajectory, damage, message):
    data = json.loads(json.dumps(trajectory.to_json()))
    damage(data)
    with pytest.raises(ValueError, match=message):
        Trajectory.from_json(data)


def test_files_that_are_none(trajectory, tmp_path):
    for name, content in (("a.json", b"{"), ("b.json", b"\xff"), ("c.json", b"[1]"), ("d.safetensors", b"not one")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="no trajectory"):
            Trajectory.load(tmp_path / name)
        with pytest.raises(ValueError, match="exists and is not a trajectory"):
            trajectory.save(tmp_path / name)
        trajectory.save(tmp_path / name, force=True)
    for name in ("e.json", "e.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            Trajectory.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"suffix must be \.json or \.safetensors"):
        trajectory.save(tmp_path / "t.txt")


def test_files_that_name_the_format_are_no_trajectories(trajectory, tmp_path):
    word = '"metalens.trajectory"'
    (tmp_path / "notes.json").write_text(json.dumps({"read": "metalens.trajectory", "format": "mine"}))
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(2)}, {"about": f'{{"format": {word}}}'})
    (tmp_path / "header.safetensors").write_bytes((2**60).to_bytes(8, "little") + word.encode())
    for name in ("notes.json", "weights.safetensors", "header.safetensors"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match="exists and is not a trajectory"):
            trajectory.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "indented.json").write_text(json.dumps(trajectory.to_json(), indent=2))
    trajectory.save(tmp_path / "indented.json")


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_flipped_bit_is_noticed(trajectory, tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    small = trajectory.select(layers=[1], positions=-1)
    small.save(path)
    whole, noticed = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 5 if suffix == "json" else 11):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = Trajectory.load(path)
        except InvalidValueError:
            noticed += 1
        else:  # a blank in place of a line end, or the name of the checksum
            assert_equal(found, small, 0)
    assert noticed > 0.9 * len(range(0, 8 * len(whole), 5 if suffix == "json" else 11))


def test_a_file_without_a_checksum_is_read(trajectory, tmp_path):
    """Files of older versions have none. One that was edited says so, until its checksum is taken out."""
    path = tmp_path / "t.json"
    trajectory.save(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "lens": {"name": "mine"}}))
    with pytest.raises(InvalidValueError, match=r"t\.json has changed since it was written: it is damaged, or was edited.*take its 'sha256' out"):
        Trajectory.load(path)
    del document["sha256"]
    path.write_text(json.dumps({**document, "lens": {"name": "mine"}}))
    assert Trajectory.load(path).lens == "mine"
    trajectory.save(tmp_path / "t.safetensors")
    arrays, metadata = mx.load(str(tmp_path / "t.safetensors"), return_metadata=True)
    mx.save_safetensors(str(tmp_path / "old.safetensors"), arrays, {"metalens": metadata["metalens"]})
    assert_equal(Trajectory.load(tmp_path / "old.safetensors"), trajectory)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_full_disk_names_the_file(trajectory, tmp_path, suffix):
    with pytest.raises(OSError, match=rf"t\.{suffix}"), largest_file(1000):
        trajectory.save(tmp_path / f"t.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_table_for_pandas(trajectory, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    table = trajectory.to_pandas()
    assert {len(column) for column in table.values()} == {4 * 5}
    at = 2 * 5 + 3  # layer 1, position 3
    assert (table["layer"][at], table["position"][at], table["token"][at]) == (1, 3, "w1")
    assert table["prediction"][at] == trajectory.texts[int(trajectory.top_ids[2, 3, 0])]
    assert table["kl"][at] == trajectory.kl[2, 3]
    assert (table["p(w7)"][at], table["rank(w7)"][at]) == (trajectory.chosen_probabilities[0, 2, 3], trajectory.chosen_ranks[0, 2, 3])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        trajectory.to_pandas()
