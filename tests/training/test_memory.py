"""What a run holds: parameters, state and gradients of its layers, and beside them the same for any number of layers and of tokens per step."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens.models.capture import HiddenStates
from metalens.models.unembed import Unembed, norm_of
from metalens.ops import Head
from metalens.training import Corpus, TrainingConfig, batching, train_loop
from support import oracle

WIDTH, VOCAB, LENGTH = 256, 500, 16


class Source:
    """Streams of any depth, from no model."""

    sharding = None

    def __init__(self, layers):
        self.layers = layers

    def __len__(self):
        return self.layers

    def capture(self, ids, *, with_embedding=False):
        return HiddenStates([mx.random.normal((*ids.shape, WIDTH)) for _ in range(self.layers)], mx.zeros(()))


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    monkeypatch.setattr(batching, "PASS_TOKENS", LENGTH)


@pytest.fixture
def peak():
    """A function that says how much memory three steps took at their peak, in matrices [D, D] of float32."""
    unembed = Unembed(norm_of(nn.RMSNorm(WIDTH)), Head(oracle.random_weight(np.random.default_rng(0), VOCAB, WIDTH)), {}, False, VOCAB)
    mx.eval(unembed.norm.weight)
    corpus = Corpus.from_ids(np.arange(4000) % VOCAB)

    def measured(layers, tokens=LENGTH, **settings):
        config = TrainingConfig(num_steps=3, max_seq_len=LENGTH, tokens_per_step=tokens, **settings)
        peaks = []
        for _ in range(3):  # what was released may be counted a little longer on a busy machine
            mx.synchronize()
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            train_loop(Source(layers), unembed, corpus, config)
            peaks.append(mx.get_peak_memory() - before)
        return min(peaks) / (4 * WIDTH**2)

    return measured


# {settings: matrices per layer: parameters, gradient, state}
KEPT = {
    "sgd": ({}, 3),
    "adam": ({"optimizer": "adam"}, 4),
    "muon": ({"optimizer": "muon"}, 3),
    "bfloat16": ({"dtype": "bfloat16"}, 2),
    "adam in bfloat16": ({"optimizer": "adam", "dtype": "bfloat16"}, 2.5),
    "one at a time": ({"layers_at_once": 1}, 1),
    "biases": ({"bias_only": True}, 3 / WIDTH),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.usefixtures("native")
def test_beside_parameters_gradients_and_state_nothing_grows_with_the_layers(peak, name):
    settings, kept = KEPT[name]
    few, many = peak(2, **settings), peak(10, **settings)
    rows = 8 * 6 * LENGTH / WIDTH if name == "biases" else 0  # streams, and their gradients, of 16 tokens
    assert kept * 10 < many < kept * 10 + 14  # of one layer, while it is updated
    assert many - few == pytest.approx(8 * kept, abs=2.5 + rows)  # one matrix more or less, by when the last was released; a copy would be 8


@pytest.mark.usefixtures("native")
def test_nor_with_the_tokens_of_a_step(peak):
    few, many = peak(4, 2 * LENGTH), peak(4, 64 * LENGTH)
    assert many == pytest.approx(few, abs=2.5)


@pytest.mark.usefixtures("native")
def test_low_rank_is_small(peak):
    assert peak(8, rank=4) < 0.2 * peak(8)  # the most of it rows
