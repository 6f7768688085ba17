"""examples/lens_from_scratch.py is the definition of a tuned lens: it runs, and metalens gives the same losses and gradients."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import metalens
from metalens.models.bundled import HELD_OUT_TEXT
from metalens.training import loss_and_gradient

SCRIPT = Path(__file__).parents[2] / "examples" / "lens_from_scratch.py"
TOKENS = 24


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("lens_from_scratch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return metalens.load("demo")


@pytest.fixture(scope="module")
def ids(model):
    return mx.array(model.encode(HELD_OUT_TEXT.read_text(encoding="utf-8"))[:TOKENS])


@pytest.fixture(scope="module")
def lens(model):
    """A lens that is off the identity, as after some steps of training."""
    rng = np.random.default_rng(3)
    lens = metalens.TunedLens(model.num_layers, model.unembed.hidden_dim)
    for translator in lens.translators:
        translator.weight = translator.weight + mx.array(rng.normal(0, 0.01, translator.weight.shape).astype(np.float32))
        translator.bias = mx.array(rng.normal(0, 0.05, translator.bias.shape).astype(np.float32))
    return lens


def test_it_computes_the_losses_and_gradients_of_metalens(example, model, ids, lens):
    states = example.hidden_states(model.model, ids)
    plain = {name: mx.stack([t[name] for t in lens.translators]) for name in ("weight", "bias")}
    theirs = example.losses(plain, model.model, states)
    gradient = mx.grad(lambda lens: example.losses(lens, model.model, states).mean())(plain)
    ours, tree = loss_and_gradient(lens, model.capture(ids), model.unembed)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=2e-5, atol=1e-5)
    for layer, mine in enumerate(tree["translators"]):
        for name in ("weight", "bias"):
            expected = np.array(gradient[name][layer])
            error = np.linalg.norm(np.array(mine[name]) - expected) / np.linalg.norm(expected)
            assert error < 1e-4, (layer, name)


def test_the_identity_lens_is_the_logit_lens(example, model, ids):
    states = example.hidden_states(model.model, ids)
    found = example.losses(example.identity_lens(model.num_layers, model.unembed.hidden_dim), model.model, states)
    expected = metalens.evaluate(model, ids, max_seq_len=TOKENS).logit
    np.testing.assert_allclose(np.array(found), [scores.kl for scores in expected], rtol=1e-4, atol=1e-5)


def test_the_script_runs_and_the_lens_gets_better():
    done = subprocess.run([sys.executable, str(SCRIPT), "3"], capture_output=True, text=True, check=True, timeout=300)
    rows = [line.split() for line in done.stdout.rpartition("tuned lens\n")[2].splitlines()]
    assert [int(row[0]) for row in rows] == list(range(8))
    logit, tuned = (sum(float(row[column]) for row in rows) for column in (1, 2))
    assert tuned < logit
    assert float(rows[-1][1]) == pytest.approx(0, abs=1e-3)
