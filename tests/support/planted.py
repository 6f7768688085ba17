"""Models with a known truth: what their blocks and their head read and write is chosen, and there is no norm."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens import InterpretableModel


class LinearBlock(nn.Module):
    """A block that adds x M^T."""

    def __init__(self, matrix: np.ndarray):
        super().__init__()
        self.matrix = mx.array(np.asarray(matrix, np.float32))

    def __call__(self, x):
        return x + x @ self.matrix.T


class PlantedModel(nn.Module):
    """Token vectors, linear blocks and a head, all given."""

    def __init__(self, embedding: np.ndarray, blocks: Sequence[np.ndarray], head: np.ndarray):
        super().__init__()
        vocab, width = embedding.shape
        self.embed_tokens = nn.Embedding(vocab, width)
        self.embed_tokens.weight = mx.array(np.asarray(embedding, np.float32))
        self.layers = [LinearBlock(matrix) for matrix in blocks]
        self.lm_head = nn.Linear(width, len(head), bias=False)
        self.lm_head.weight = mx.array(np.asarray(head, np.float32))

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def planted(embedding: np.ndarray, blocks: Sequence[np.ndarray], head: np.ndarray) -> InterpretableModel:
    """Return the model, ready for lenses."""
    return InterpretableModel(PlantedModel(embedding, blocks, head), accelerate=False)


def random_directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Return orthonormal rows [count, width]."""
    return np.linalg.qr(rng.standard_normal((width, count)))[0].T


def reading(directions: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    """Return the matrix that scales each of some orthonormal directions, and nothing else."""
    return (directions.T * np.asarray(scales)) @ directions
