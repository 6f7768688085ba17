"""The recipes against a trainer in float64 NumPy that is written from the paper and from upstream's code, not from this package.

It keeps A = W - I and b as upstream does, adds the layers' losses up, and takes PyTorch's formulas for its optimizers.
"""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.models.layers import EMBEDDING
from metalens.training import TrainingConfig, batching, recipe, train_loop
from metalens.training.optimizer import LensMuon
from metalens.training.polar import polynomials
from support import oracle

LENGTH, WIDTH, LAYERS = 16, 64, 3


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    """So that the gradient of a step is accumulated over several batches."""
    monkeypatch.setattr(batching, "PASS_TOKENS", 2 * LENGTH)


@pytest.fixture
def ids():
    """Seven sequences and a shorter one: pairs in batches, and steps of several lengths."""
    return np.random.default_rng(7).integers(0, 131, 7 * LENGTH + 5)


def chunks_of_steps(ids, tokens_per_step, num_steps):
    """The sequences of every step: in the text's order, whole, over and over."""
    chunks = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    steps, position = [], 0
    for _ in range(num_steps):
        taken = []
        while sum(map(len, taken)) < tokens_per_step:
            taken.append(chunks[position % len(chunks)])
            position += 1
        steps.append(taken)
    return steps


class Trainer:
    """Trains A [L, D, D] and b [L, D], zeros at the start, of logits = U norm(h + A h + b).

    With the embedding, upstream's layers: the first is the input of block 0. One more than upstream's is the output of the last block, whose gradient
    is 0.
    """

    def __init__(self, model, ids, *, tokens_per_step, num_steps, update, mean=False, clip=None, decay=0.0, embedding=False):
        self.model, self.head, self.mean, self.clip, self.decay = model, model.unembed.head, mean, clip, decay
        self.gain, self.eps = oracle.wide(model.unembed.norm.weight), model.unembed.norm.eps
        self.layers = [*([EMBEDDING] if embedding else []), *range(LAYERS)]
        self.a, self.b = np.zeros((len(self.layers), WIDTH, WIDTH)), np.zeros((len(self.layers), WIDTH))
        self.losses, self.norms = [], []
        state = {}
        for step, sequences in enumerate(chunks_of_steps(ids, tokens_per_step, num_steps)):
            gradient = self.gradient(sequences)
            norm = np.sqrt(sum((g**2).sum() for g in gradient))
            self.norms.append(norm)
            coefficient = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            decayed = [coefficient * g + decay * p for g, p in zip(gradient, (self.a, self.b), strict=True)]
            for name, p, g in zip("ab", (self.a, self.b), decayed, strict=True):
                for layer in range(len(self.layers)):
                    change = update(g[layer], state.setdefault((name, layer), {}), step)
                    p[layer] -= (1 - step / num_steps) * change

    def normed_and_logits(self, y):
        """(1 / rms, y / rms, logits)."""
        inverse = 1 / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + self.eps)
        return inverse, y * inverse, oracle.head_logits(y * inverse * self.gain, self.head)

    def gradient(self, sequences):
        """Of the mean over tokens, summed over layers or their mean; and the losses, before the update."""
        streams = [self.model.source.capture(mx.array(s[None]), with_embedding=True) for s in sequences]
        tokens = sum(map(len, sequences))
        last = np.concatenate([oracle.wide(stream.hidden[-1][0]) for stream in streams])
        z_model = self.normed_and_logits(last)[2]
        da, db, losses = np.zeros_like(self.a), np.zeros_like(self.b), []
        for layer, name in enumerate(self.layers):
            h = np.concatenate([oracle.wide((stream.embedding if name == EMBEDDING else stream.hidden[name])[0]) for stream in streams])
            y = h + h @ self.a[layer].T + self.b[layer]
            inverse, n, z = self.normed_and_logits(y)
            kl, difference = oracle.kl_and_difference(z_model, z)
            losses.append(kl.mean())
            dn = difference @ oracle.matrix(self.head.weight) * self.gain / tokens
            dy = inverse * (dn - n * np.mean(dn * n, axis=1, keepdims=True))
            da[layer], db[layer] = dy.T @ h, dy.sum(axis=0)
        self.losses.append(losses)
        return [g / len(self.layers) if self.mean else g for g in (da, db)]


def nesterov(rate, momentum):
    def update(g, state, step):
        state["v"] = momentum * state.get("v", 0) + g
        return rate * (g + momentum * state["v"])

    return update


def adam(rate, beta_1, beta_2=0.999, eps=1e-8):
    def update(g, state, step):
        state["m"] = beta_1 * state.get("m", 0) + (1 - beta_1) * g
        state["v"] = beta_2 * state.get("v", 0) + (1 - beta_2) * g**2
        m, v = state["m"] / (1 - beta_1 ** (step + 1)), state["v"] / (1 - beta_2 ** (step + 1))
        return rate * m / (np.sqrt(v) + eps)

    return update


def muon(rate, momentum):
    """Keller Jordan's, with the momentum as a running mean, and the polynomials of polar.py; a vector is scaled to unit length."""

    def update(g, state, step):
        state["v"] = momentum * state.get("v", 0) + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * state["v"]
        size = np.linalg.norm(x)
        if x.ndim == 1 or not size:
            return rate * x / (size or 1)
        u, s, v = np.linalg.svd(x / (1.01 * size))
        for polynomial in polynomials(WIDTH)[0]:
            s = sum(c * s ** (2 * i + 1) for i, c in enumerate(polynomial))
        return rate * (u * s) @ v

    return update


def compare(model, ids, config, trainer, *, tolerance=5e-6):
    seen = []
    lens = train_loop(model.source, model.unembed, mx.array(ids), config, callbacks=[seen.append])
    assert [p.step for p in seen] == list(range(config.num_steps))
    np.testing.assert_allclose([p.losses for p in seen], trainer.losses, atol=tolerance)
    np.testing.assert_allclose([p.gradient_norm for p in seen], trainer.norms, rtol=1e-3)
    assert lens.translated == seen[0].layers == trainer.layers
    found = [tuple(map(oracle.wide, lens.dense(layer))) for layer in trainer.layers]
    np.testing.assert_allclose([weight - np.eye(WIDTH) for weight, _ in found], trainer.a, atol=tolerance)
    np.testing.assert_allclose([bias for _, bias in found], trainer.b, atol=tolerance)
    assert np.abs(trainer.a).max() > 1e-3  # something was learned
    return seen


def llama_with_norm(make_llama, scale):
    """A float32 Llama without quantization, its final norm (and so logits, losses and gradients) larger or smaller."""
    model = make_llama(bits=None)
    model.model.norm.weight = model.model.norm.weight * scale
    return InterpretableModel(model)


@pytest.mark.parametrize(("scale", "clipped"), [(1.0, False), (8.0, True)], ids=["gentle", "clipped"])
@pytest.mark.usefixtures("cpu_backend")
def test_the_paper_s_recipe(make_llama, ids, scale, clipped):
    model = llama_with_norm(make_llama, scale)
    config = recipe("paper", num_steps=10, max_seq_len=LENGTH, tokens_per_step=4 * LENGTH)
    assert (config.learning_rate, config.momentum, config.gradient_clip, config.weight_decay, config.reduction) == (0.1, 0.9, 1.0, 1e-3, "sum")
    trainer = Trainer(model, ids, tokens_per_step=4 * LENGTH, num_steps=10, update=nesterov(0.1, 0.9), clip=1.0, decay=1e-3, embedding=True)
    assert [norm > 1 for norm in trainer.norms] == [clipped] * 10
    seen = compare(model, ids, config, trainer)
    assert [p.learning_rate for p in seen] == pytest.approx([0.1 * (1 - s / 10) for s in range(10)])
    assert all(p.losses[-1] < 1e-9 for p in seen)  # the last block's translator stays the identity; decay does not move it


@pytest.mark.parametrize(("missing", "scale", "least"), [("clip", 8.0, 0.1), ("decay", 8.0, 3e-5), ("sum", 1.0, 0.01), ("embedding", 8.0, 0.01)])
def test_every_part_of_the_recipe_shows(make_llama, ids, missing, scale, least):
    """What the comparison above would say if one of them were missing; its tolerance is 5e-6."""
    model = llama_with_norm(make_llama, scale)
    settings = {"clip": None if missing == "clip" else 1.0, "decay": 0.0 if missing == "decay" else 1e-3, "mean": missing == "sum"}
    settings["embedding"] = missing != "embedding"
    trainer = Trainer(model, ids, tokens_per_step=4 * LENGTH, num_steps=10, update=nesterov(0.1, 0.9), **settings)
    lens = train_loop(model.source, model.unembed, mx.array(ids), recipe("paper", num_steps=10, max_seq_len=LENGTH, tokens_per_step=4 * LENGTH))
    pairs = zip(trainer.layers, trainer.a, strict=True)
    difference = max(np.abs(oracle.wide(lens.dense(layer)[0]) - np.eye(WIDTH) - a).max() for layer, a in pairs)
    assert difference > least


def test_mlxterp_s_recipe(make_llama, ids):
    model = llama_with_norm(make_llama, 1.0)
    trainer = Trainer(model, ids, tokens_per_step=LENGTH, num_steps=10, update=nesterov(1.0, 0.9), mean=True, clip=1.0)
    compare(model, ids, recipe("mlxterp", num_steps=10, max_seq_len=LENGTH), trainer)


def test_adam(make_llama, ids):
    # Gradients of 1e-8 and less are to Adam's steps what rounding makes of them, so few and small steps; layers whose gradient is 0 stay at 0.
    model = llama_with_norm(make_llama, 1.0)
    trainer = Trainer(model, ids, tokens_per_step=4 * LENGTH, num_steps=3, update=adam(1e-3, 0.9), clip=1.0, decay=1e-3, embedding=True)
    config = recipe("adam", num_steps=3, max_seq_len=LENGTH, tokens_per_step=4 * LENGTH)
    compare(model, ids, config, trainer)


def test_muon(make_llama, ids, monkeypatch):
    monkeypatch.setattr(LensMuon, "precision", "float32")  # what it is rounded to by default depends on the CPU
    model = llama_with_norm(make_llama, 1.0)
    trainer = Trainer(model, ids, tokens_per_step=4 * LENGTH, num_steps=3, update=muon(0.02, 0.9))
    compare(model, ids, recipe("muon", num_steps=3, max_seq_len=LENGTH, tokens_per_step=4 * LENGTH), trainer)


def test_muon_decays_towards_the_identity(make_llama, ids):
    model = llama_with_norm(make_llama, 1.0)
    settings = {"num_steps": 3, "max_seq_len": LENGTH, "learning_rate": 0.02, "optimizer": "muon", "reduction": "sum"}
    plain, decayed = (train_loop(model.source, model.unembed, mx.array(ids), TrainingConfig(**settings, weight_decay=d)) for d in (0.0, 5.0))
    first, second = (np.linalg.norm(oracle.wide(lens.translators[0].weight) - np.eye(WIDTH)) for lens in (plain, decayed))
    assert 0.5 * first < second < 0.95 * first
