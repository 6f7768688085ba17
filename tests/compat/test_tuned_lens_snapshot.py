"""Snapshots of upstream's training, in the layout of its State.save, written by the real torch."""

import pickle
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest

from metalens import TunedLens, evaluate
from metalens.compat.tuned_lens import convert, load_lens
from metalens.lenses.opening import files_read, lens_kind_at

D, L = 64, 3


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="snapshots are written by torch, which the bench extra installs")


class Marks:
    """An object whose unpickling would be noticed."""

    called = False

    def __reduce__(self):
        return _mark, ("seen",)


def _mark(_):
    Marks.called = True


@pytest.fixture
def lens(torch):
    """Upstream's lens: its translators, and the unembedding that its state dict has too."""
    torch.manual_seed(0)

    class Lens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unembed = torch.nn.Sequential(OrderedDict(final_norm=torch.nn.LayerNorm(D), unembedding=torch.nn.Linear(D, 11, bias=False)))
            self.layer_translators = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(L))

    return Lens()


def snapshot(torch, lens, path, optimizer="sgd", wrapped=False, dtype=None, **more):
    """Write what upstream's State.save writes."""
    lens = lens.to(dtype) if dtype is not None else lens
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    opt = kind(lens.layer_translators.parameters(), lr=0.1, **({"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {"amsgrad": True}))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / 250)
    sum((p.float() ** 2).sum() for p in lens.layer_translators.parameters()).backward()
    opt.step()
    scheduler.step()
    state = lens.state_dict()
    if wrapped:
        state = OrderedDict((f"module.{name}", value) for name, value in state.items())
    data = {"serialized_datapipe": pickle.dumps(SimpleNamespace(epoch=3)), "reading_service_state": None, "seed": 2**40, "object": Marks()}
    content = {"lens": state, "optim": opt.state_dict(), "scheduler": scheduler.state_dict(), "dataloader": data, "step": 100, "wandb_id": None}
    torch.save(content | more, path)
    return path


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "in DistributedDataParallel"])
def test_its_lens(torch, lens, tmp_path, optimizer, wrapped):
    path = snapshot(torch, lens, tmp_path / "snapshot_100.pth", optimizer, wrapped)
    Marks.called = False
    found = TunedLens.load(path)
    assert not Marks.called  # nothing that the file names was called
    theirs = [(t.weight.detach().numpy(), t.bias.detach().numpy()) for t in lens.layer_translators]
    assert (found.num_layers, found.hidden_dim, found.translated) == (L, D, ["embedding", 0, 1, 2])
    for layer, (weight, bias) in zip(("embedding", 0, 1), theirs, strict=True):
        ours = [np.array(part) for part in found.dense(layer)]
        np.testing.assert_allclose(ours[0], np.eye(D) + weight, atol=1e-7)
        np.testing.assert_array_equal(ours[1], bias)
    np.testing.assert_array_equal(np.array(found.dense(2)[0]), np.eye(D))
    assert found.provenance == {"tuned_lens": {"step": 100}}


def test_half_precision(torch, lens, tmp_path):
    path = snapshot(torch, lens, tmp_path / "snapshot_1.pth", dtype=torch.float16)
    weight = lens.layer_translators[1].weight.detach().float().numpy()
    np.testing.assert_allclose(np.array(TunedLens.load(path).translators[0].weight), np.eye(D) + weight, atol=1e-7)


def test_it_is_a_lens_wherever_one_is_asked_for(torch, lens, tmp_path, make_llama):
    from metalens import InterpretableModel

    path = snapshot(torch, lens, tmp_path / "snapshot_100.pth")
    assert lens_kind_at(path) == "snapshot"
    assert files_read(path) == [path]
    model = InterpretableModel(make_llama())
    assert evaluate(model, list(range(20)), path).tuned == evaluate(model, list(range(20)), TunedLens.load(path)).tuned
    convert(path, tmp_path / "pair")
    assert TunedLens.load(tmp_path / "pair").translated == load_lens(path).translated
    convert(path, tmp_path / "folder", to="tuned-lens", model_name="org/model")
    np.testing.assert_allclose(np.array(TunedLens.load(tmp_path / "folder")[1].weight), np.array(TunedLens.load(path)[1].weight), atol=1e-7)


def test_what_is_no_snapshot(torch, lens, tmp_path):
    path = tmp_path / "snapshot_1.pth"
    torch.save(lens.state_dict(), path)
    with pytest.raises(ValueError, match="not a snapshot of tuned-lens's training, or is damaged: it has no 'lens'"):
        TunedLens.load(path)
    torch.save({"lens": {"unembed.weight": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match="its lens has no translators"):
        TunedLens.load(path)
    torch.save({"lens": {"layer_translators.0.weight": torch.zeros(2, 3)}}, path)
    with pytest.raises(ValueError, match="shape"):
        TunedLens.load(path)
    torch.save({"lens": {"layer_translators.0.weight": torch.zeros(2, 2, dtype=torch.int64)}}, path)
    with pytest.raises(ValueError, match="no tensors of float32"):
        TunedLens.load(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds no dict"):
        TunedLens.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no archive of torch.save"):
        TunedLens.load(path)
    with pytest.raises(FileNotFoundError, match="No lens at"):
        TunedLens.load(tmp_path / "snapshot_2.pth")


def test_damage(torch, lens, tmp_path, rng):
    whole = snapshot(torch, lens, tmp_path / "snapshot_1.pth").read_bytes()
    for _ in range(60):
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        data[at : at + 8] = rng.bytes(8)
        (tmp_path / "snapshot_2.pth").write_bytes(bytes(data[: int(rng.integers(1, len(data) + 1))] if rng.random() < 0.3 else data))
        try:
            TunedLens.load(tmp_path / "snapshot_2.pth")
        except ValueError as error:
            assert "snapshot_2.pth" in str(error)  # noqa: PT017  damage in what is not read makes no difference


def test_a_whole_pickled_lens_is_no_state_dict(torch, tmp_path):
    torch.save({"lens": torch.nn.Linear(2, 2), "step": 1}, tmp_path / "snapshot_1.pth")
    with pytest.raises(ValueError, match="it has no 'lens'"):
        TunedLens.load(tmp_path / "snapshot_1.pth")
    assert "data.pkl" in {name.rpartition("/")[2] for name in zipfile.ZipFile(tmp_path / "snapshot_1.pth").namelist()}
