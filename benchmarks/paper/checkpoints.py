"""Train a tiny Llama with MLX and keep checkpoints on the way, for the experiment that asks when an example was learned."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from benchmarks.paper.subjects import LENGTH, TINY, WORK
from mlx_lm.models import llama

from metalens.models import bundled
from metalens.models.loading import load

STEPS = (5, 10, 20, 30, 45, 60, 80, 100, 130, 160)  # of the checkpoints; the last one is the model
BATCH = 4  # sequences of a step
RATE = 5e-3
CONFIG = {
    "model_type": "llama",
    "vocab_size": 6000,  # the bundled model's tokenizer
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def trained(seed: int) -> list[Path]:
    """Return the folders of the checkpoints, in the order of their steps. Train the model if they are not there."""
    folder = WORK / "models" / f"{TINY}-seed{seed}"
    found = [folder / f"step-{step}" for step in STEPS]
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _train(seed, unfinished)
        os.replace(unfinished, folder)
    return found


def _train(seed: int, folder: Path) -> None:
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs(**CONFIG))
    _, tokenizer = load(str(bundled.MODEL))
    ids = np.array(tokenizer.encode(bundled.TRAINING_TEXT.read_text(encoding="utf-8")))
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    optimizer = optim.AdamW(learning_rate=RATE, weight_decay=0.01)
    loss_and_gradient = nn.value_and_grad(model, _loss)
    for step in range(1, STEPS[-1] + 1):
        start = (step - 1) * BATCH
        batch = mx.array(rows[order[np.arange(start, start + BATCH) % len(order)]])
        _, gradient = loss_and_gradient(model, batch)
        optimizer.learning_rate = RATE * min(1.0, step / 20) * (1 - 0.9 * step / STEPS[-1])
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        if step in STEPS:
            _save(model, folder / f"step-{step}")


def _loss(model: nn.Module, batch: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")


def _save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in TOKENIZER:
        shutil.copy(bundled.MODEL / name, folder / name)
