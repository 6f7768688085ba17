"""Run whole pipelines: training with the capture of the hidden states, the capture alone, and evaluation. The model is the demo model or another."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from benchmarks.competitor import TORCH_BF16, Competitor, LeftOutError, mlx_competitor, torch_competitor, torch_module
from benchmarks.torch_lens import TorchModel
from benchmarks.torch_lens import train as torch_train

from metalens import InterpretableModel, TunedLens, accelerate, evaluate
from metalens.models.bundled import HELD_OUT_TEXT, NAME, TRAINING_TEXT
from metalens.models.registry import path_of
from metalens.training import Corpus, Sampler, TrainingConfig, train_loop
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError, UnavailableError

# SGD on whole sequences, as in the PyTorch implementation.
CONFIG = TrainingConfig(num_steps=1, max_seq_len=128, tokens_per_step=512, learning_rate=1.0, seed=0)


@cache
def demo_model() -> InterpretableModel:
    """Return the model of `metalens demo`. On the reference backend its layers are plain MLX."""
    return named_model(NAME)


@cache
def named_model(name: str) -> InterpretableModel:
    """Return a model by its name or path, with its layers switched whatever the backend is.

    Raises:
        LeftOutError: if the model would have to be downloaded or converted first.
    """
    try:
        path = path_of(name)
    except (InvalidValueError, UnavailableError) as error:
        raise LeftOutError(f"The model {name} is not on this machine: load it once with `metalens.load({name!r})`.") from error
    model = InterpretableModel(path)
    accelerate(model.model)
    return model


@cache
def training_ids() -> mx.array:
    """Return the ids of the bundled training text."""
    return demo_model().training_ids([TRAINING_TEXT.read_text(encoding="utf-8")])


def config(steps: int, sequences: int) -> TrainingConfig:
    """Return the settings for `steps` steps of `sequences` sequences."""
    return replace(CONFIG, num_steps=steps, tokens_per_step=sequences * CONFIG.max_seq_len)


def make(name: str, operation: str, **sizes: int) -> Competitor:
    """Return a competitor for the operation 'train', 'capture' or 'evaluate'."""
    return {"train": make_training, "capture": make_capture, "evaluate": make_evaluation}[operation](name, **sizes)


def make_training(name: str, steps: int, sequences: int) -> Competitor:
    """Return a competitor that trains a lens; its result is [W - I of all layers, b of all layers].

    A unit is a sequence; a run on fewer units is one step on that number of sequences. Each array holds all layers, because the last
    layer's values are only rounding errors, which differ between implementations.
    """
    whole = config(steps, sequences)
    model, ids = demo_model(), training_ids()

    def settings(units: int) -> TrainingConfig:
        return whole if units == steps * sequences else config(1, units)

    if name.startswith("PyTorch"):
        sampler = Sampler(Corpus.from_ids(np.array(ids)), whole.max_seq_len, seed=whole.seed)
        chosen = [sequence for _ in range(steps) for sequence in sampler.take_tokens(whole.step_tokens)]
        torch_model, batches = TorchModel(model.model), [sequence.astype(np.int64)[None] for sequence in chosen]
        return torch_competitor(steps * sequences, lambda units: torch_train(torch_model, batches, settings(units), name == TORCH_BF16))

    def compute(units: int) -> list[mx.array]:
        lens = train_loop(model.source, model.unembed, ids, settings(units))
        return [mx.stack([t.weight - mx.eye(lens.hidden_dim) for t in lens.translators]), mx.stack([t.bias for t in lens.translators])]

    return mlx_competitor(name, steps * sequences, compute)


def make_capture(name: str, tokens: int, sequences: int = 1, model: str = NAME) -> Competitor:
    """Return a competitor that captures [the output of every block] for `sequences` sequences of `tokens` tokens.

    A unit is a token of each sequence.
    """
    ours = named_model(model)
    ids = np.random.default_rng(0).integers(5, 3000, (sequences, tokens))  # any text takes the same time
    if not name.startswith("PyTorch"):
        return mlx_competitor(name, tokens, lambda units: ours.source.capture(mx.array(ids[:, :units])).hidden)
    torch = torch_module()
    torch_model, torch_ids = TorchModel(ours.model), torch.from_numpy(ids)

    def compute(units: int) -> list[Any]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == TORCH_BF16):
            return torch_model.hidden(torch_ids[:, :units])

    return torch_competitor(tokens, compute)


def make_evaluation(name: str, tokens: int) -> Competitor:
    """Return a competitor that evaluates the logit lens and an untrained tuned lens.

    Its result is [KL and cross-entropy of the logit lens, KL and cross-entropy of the tuned lens], each per layer.
    """
    model = demo_model()
    lens = TunedLens(len(model.source), model.unembed.hidden_dim)
    ids = model.ids(HELD_OUT_TEXT.read_text(encoding="utf-8"))[0]

    def compute(units: int) -> list[mx.array]:
        scores = evaluate(model, ids[: max(2, units)], lens, max_seq_len=CONFIG.max_seq_len)
        return [mx.array([getattr(layer, field) for layer in each]) for each in (scores.logit, scores.tuned or []) for field in ("kl", "ce")]

    return mlx_competitor(name, tokens, compute)


def largest_logit_difference(tokens: int = 128) -> float:
    """Return the largest difference between the demo model's logits in MLX and in PyTorch, on training text."""
    model, ids = demo_model(), training_ids()[None, :tokens]
    torch = torch_module()
    torch_model = TorchModel(model.model)
    with torch.no_grad():
        theirs = torch_model.unembed(torch_model.hidden(torch.from_numpy(np.array(ids).astype(np.int64)))[-1])
    return to_float(mx.max(mx.abs(model.model(ids).astype(mx.float32) - mx.array(theirs.numpy()))))
