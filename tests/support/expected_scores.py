"""What `evaluate` should find, in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from support import oracle


def random_ids(rng, tokens):
    return rng.integers(0, 131, tokens).tolist()


def expected_scores(model, sequences, lens, bytes_per_token=1.0):
    """Per layer (the last entry is the model's own) the fields of Scores in float64, over the given sequences of ids."""
    unembedding = oracle.Unembedding(model.unembed)
    rows = [[] for _ in range(len(model.source) + 1)]
    for ids in sequences:
        hidden = [oracle.wide(h)[0] for h in model.source.capture(mx.array([ids])).hidden]
        z_model = unembedding.logits(hidden[-1])
        if lens is None:
            logits = [unembedding.logits(h) for h in hidden]
        else:
            logits = [unembedding.translated(h, oracle.wide(t.weight), oracle.wide(t.bias)) for h, t in zip(hidden, lens.translators, strict=True)]
        for kept, z in zip(rows, [*logits, z_model], strict=True):
            nll = -np.take_along_axis(oracle.log_softmax(z[:-1]), np.array(ids[1:], int)[:, None], axis=-1)[:, 0]
            kept.append((oracle.kl(z_model, z), nll, z.argmax(-1) == z_model.argmax(-1), oracle.entropy(z)))
    result = []
    for kept in rows:
        kl, ce, top1, entropy = (np.concatenate(parts).mean() for parts in zip(*kept, strict=True))
        nats = {"kl": kl, "ce": ce, "entropy": entropy}
        bpb = {"bits_per_byte" if name == "ce" else f"{name}_bits_per_byte": x / math.log(2) / bytes_per_token for name, x in nats.items()}
        result.append(nats | bpb | {"top1": top1})
    return result


def assert_scores(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert vars(a) == pytest.approx(b, abs=1e-5)
