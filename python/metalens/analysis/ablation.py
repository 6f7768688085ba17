"""Ablate directions of the residual stream, or whole blocks, in the running model.

Each function returns an edit for `ResidualCapture.capture(ids, edits={block: edit})`. Source: Belrose et al. 2023, section 4.1. To ablate
is to replace a part of each vector:

    zero      by 0
    mean      by its mean over positions
    resample  by that of another position, drawn without fixed points
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike

from metalens.models.capture import BlockEdit, Edit
from metalens.utils.errors import InvalidValueError

AblationMode: TypeAlias = Literal["mean", "zero", "resample"]
MODES: Final[tuple[AblationMode, ...]] = ("mean", "zero", "resample")
# Relative size below which a singular value is rounding: such vectors are linearly dependent.
DEPENDENT = 1e-7


def orthonormal_basis(vectors: ArrayLike) -> np.ndarray:
    """Return an orthonormal basis of the span of vectors, by a QR decomposition: its first j rows span the first j vectors.

    Args:
        vectors: [k, D] vectors, or one vector [D].

    Returns:
        [k, D] float64.

    Raises:
        InvalidValueError: if the vectors are linearly dependent, are not finite, or there are none.
    """
    rows = np.atleast_2d(np.asarray(vectors, np.float64))
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise InvalidValueError(f"A subspace needs finite vectors [k, D], or one [D], got {np.shape(vectors)}.")
    q, r = np.linalg.qr(rows.T)
    sizes = np.linalg.norm(rows, axis=1)
    if len(rows) > rows.shape[1] or (np.abs(np.diag(r)) <= DEPENDENT * sizes).any():
        raise InvalidValueError(f"The {len(rows)} vectors of width {rows.shape[1]} are linearly dependent. Leave out those in the span of others.")
    basis: np.ndarray = (q * np.sign(np.diag(r))).T
    return basis


def remove_subspace(h: mx.array, basis: mx.array, replacement: mx.array | None = None) -> mx.array:
    """Replace the part of vectors that lies in a subspace: h + (replacement - h) A^T A. Lazy; differentiable in h and basis.

    Args:
        h: [..., D] vectors.
        basis: A [k, D], orthonormal rows.
        replacement: [..., D] vectors whose part in the subspace is put there. None = 0, the projection on the orthogonal complement.

    Returns:
        [..., D].
    """
    change = -h if replacement is None else replacement - h
    return h + (change @ basis.T) @ basis


def derangement(size: int, seed: int = 0) -> np.ndarray:
    """Draw a permutation [size] without fixed points: a cycle through all indices, by Sattolo's algorithm.

    Raises:
        InvalidValueError: if there are fewer than two indices.
    """
    if size < 2:
        raise InvalidValueError(f"To resample takes at least two vectors: {size} can't change places.")
    rng = np.random.default_rng(seed)
    order = np.arange(size)
    for last in range(size - 1, 0, -1):
        other = int(rng.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def replacement_of(h: mx.array, mode: AblationMode, *, mean: mx.array | None = None, seed: int = 0) -> mx.array:
    """Return the vectors that replace others, or a part of them, in an ablation.

    Args:
        h: [..., D] vectors.
        mode: the kind of ablation.
        mean: [D] the mean that mode "mean" puts in. None = the mean of h.
        seed: seed of the derangement of mode "resample".

    Returns:
        an array like h.

    Raises:
        InvalidValueError: for an unknown mode, fewer than two vectors to resample, or a mean of another width.
    """
    _check(mode)
    rows = h.reshape(-1, h.shape[-1])
    if mode == "zero":
        return mx.zeros_like(h)
    if mode == "resample":
        return rows[mx.array(derangement(len(rows), seed))].reshape(h.shape)
    center = rows.astype(mx.float32).mean(axis=0) if mean is None else mean
    if center.shape != h.shape[-1:]:
        raise InvalidValueError(f"The mean of vectors of width {h.shape[-1]} must be ({h.shape[-1]},), got {center.shape}.")
    return mx.broadcast_to(center.astype(h.dtype), h.shape)


def _check(mode: str) -> None:
    if mode not in MODES:
        raise InvalidValueError(f"There is no ablation {mode!r}; there are {', '.join(MODES)}.")


def ablate_subspace(vectors: ArrayLike, mode: AblationMode = "mean", *, mean: ArrayLike | None = None, seed: int = 0) -> Edit:
    """Return an edit that ablates a subspace of a block's output at every position.

    Args:
        vectors: [k, D] vectors that span the subspace, or one vector [D].
        mode: the kind of ablation.
        mean: [D] the mean that mode "mean" puts in, for example over a whole text. None = the mean of the positions that are read.
        seed: seed of mode "resample".

    Raises:
        InvalidValueError: for an unknown mode, or vectors that span no subspace of dimension k. The edit raises it for another width.
    """
    basis = mx.array(orthonormal_basis(vectors).astype(np.float32))
    center = None if mean is None else mx.array(np.asarray(mean, np.float32))
    _check(mode)

    def edit(h: mx.array) -> mx.array:
        if h.shape[-1] != basis.shape[1]:
            raise InvalidValueError(f"The subspace has vectors of width {basis.shape[1]}, and the residual stream has width {h.shape[-1]}.")
        wide = h.astype(mx.float32)
        return remove_subspace(wide, basis, replacement_of(wide, mode, mean=center, seed=seed)).astype(h.dtype)

    return edit


def ablate_block(mode: AblationMode = "zero", *, mean: ArrayLike | None = None, seed: int = 0) -> BlockEdit:
    """Return an edit that ablates what a block adds to the residual stream. Mode "zero" deletes the block.

    Args:
        mode: the kind of ablation of output - input.
        mean: [D] the mean that mode "mean" adds instead. None = the mean of the positions that are read.
        seed: seed of mode "resample".

    Raises:
        InvalidValueError: for an unknown mode.
    """
    center = None if mean is None else mx.array(np.asarray(mean, np.float32))
    _check(mode)

    def edit(given: mx.array, output: mx.array) -> mx.array:
        if mode == "zero":
            return given
        added = output.astype(mx.float32) - given.astype(mx.float32)
        return (given.astype(mx.float32) + replacement_of(added, mode, mean=center, seed=seed)).astype(output.dtype)

    return BlockEdit(edit)
