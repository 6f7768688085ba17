"""What tests of tuned-lens's files share: fixtures that torch wrote, archives made of their records, and what two equal lenses are."""

import io
import os
import warnings
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from metalens import TunedLens
from metalens.compat import tuned_lens as files

DATA = Path(__file__).parents[1] / "compat" / "data" / "tuned_lens"
ZIP = (DATA / "zip-float32" / "params.pt").read_bytes()
LEGACY = (DATA / "legacy-float16" / "params.pt").read_bytes()
with zipfile.ZipFile(DATA / "zip-float32" / "params.pt") as _archive:
    RECORDS = {name: _archive.read(name) for name in _archive.namelist()}
PICKLE = RECORDS["params/data.pkl"]
CONFIG = (DATA / "zip-float32" / "config.json").read_text()
LAYERS, DIM = 3, 4


def lens_of(form=None, num_layers=LAYERS, dim=DIM, seed=0, last=False):
    """A lens with random translators; the last is the identity unless said otherwise."""
    lens = TunedLens(num_layers, dim, **(form or {}))
    rng = np.random.default_rng(seed)
    for layer in lens.layers if last else [layer for layer in lens.layers if layer < num_layers - 1]:
        translator = lens.translators[layer]
        translator.update(tree_map(lambda p: p + mx.array(rng.normal(0, 0.3, p.shape).astype(np.float32)), translator.parameters()))
    return lens


def assert_same_map(a, b, tolerance=0.0):
    assert (a.num_layers, a.hidden_dim) == (b.num_layers, b.hidden_dim)
    for layer in range(a.num_layers):
        for x, y in zip(a.dense(layer), b.dense(layer), strict=True):
            np.testing.assert_allclose(np.array(x), np.array(y), rtol=0, atol=tolerance)


def zipped(records, **options):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", **options) as out:
        warnings.simplefilter("ignore")
        for name, content in records.items() if isinstance(records, dict) else records:
            out.writestr(name, content)
    return buffer.getvalue()


def legacy(*pickles, after=b""):
    return b"".join(pickles) + after


def refused(folder, content, message="is not a tuned lens file, or is damaged"):
    (folder / "params.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.load(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "params.pt"]
