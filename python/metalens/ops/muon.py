"""muon_direction: momentum, scales and the orthogonal factor of a matrix, the direction of a step of Muon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.backends import extension, extension_precision
from metalens.ops.dispatch import Operation
from metalens.ops.matmul import gram

# Coefficients of s, s^3 and s^5.
Polynomial = tuple[float, float, float]


@dataclass(frozen=True)
class MuonDirection:
    """What `muon_direction` returns. Float32.

    Attributes:
        momentum: V = beta momentum + (1 - beta) gradient, [N, K].
        direction: P [N, K].
        slopes: <gradient, P> and <U, P>, [2].
    """

    momentum: mx.array
    direction: mx.array
    slopes: mx.array


def muon_direction(
    gradient: mx.array,
    momentum: mx.array,
    beta: float,
    polynomials: Sequence[Polynomial],
    slack: float = 1.0,
    row_scale: mx.array | None = None,
    column_scale: mx.array | None = None,
) -> MuonDirection:
    """Return the direction of a step of Muon with Nesterov momentum for one matrix.

    With U = (1 - beta) gradient + beta V, and diagonal matrices R and S of the scales, P = R p(X) S^-1 for X = R U S^-1 / (slack |R U S^-1|), where
    |.| is the Frobenius norm. p is an odd polynomial of the singular values: `polynomials`, one after the other. P of U = 0 is 0.

    The norm comes from squares in float32. So all entries of R U S^-1 must be smaller than about 1e19 / sqrt(N K), and the largest must be at least
    about 1e-19. P is wrong beyond that range, often 0, and no error is raised.

    Args:
        gradient: [N, K] float32.
        momentum: momentum before the step, [N, K] float32.
        beta: factor of the momentum, from 0 to 1.
        polynomials: the coefficients of each polynomial, of s, s^3 and s^5.
        slack: factor of the norm; a little above 1 keeps rounded singular values below 1.
        row_scale: diagonal of R, [N]; None = 1.
        column_scale: diagonal of S, [K]; None = 1.
    """
    return MuonDirection(*_MUON_DIRECTION(gradient, momentum, beta, polynomials, slack, row_scale, column_scale))


def _reference(
    gradient: mx.array,
    momentum: mx.array,
    beta: float,
    polynomials: Sequence[Polynomial],
    slack: float,
    row_scale: mx.array | None,
    column_scale: mx.array | None,
) -> Sequence[mx.array]:
    v = beta * momentum + (1 - beta) * gradient
    u = (1 - beta) * gradient + beta * v
    rows = mx.ones(()) if row_scale is None else row_scale[:, None]
    columns = mx.ones(()) if column_scale is None else column_scale
    x = rows * u / columns
    norm = mx.linalg.norm(x)
    wide = x.shape[0] <= x.shape[1]
    found = (x if wide else x.T) / mx.where(norm == 0, 1.0, slack * norm)
    for a, b, c in polynomials:
        squares = gram(found)
        found = a * found + (b * squares + c * gram(squares)) @ found
        mx.eval(found)  # MLX on a CPU reserves memory for all arrays that are computed together
    direction = rows * (found if wide else found.T) / columns
    return v, direction, mx.stack([mx.sum(gradient * direction), mx.sum(u * direction)])


def _native(
    gradient: mx.array,
    momentum: mx.array,
    beta: float,
    polynomials: Sequence[Polynomial],
    slack: float,
    row_scale: mx.array | None,
    column_scale: mx.array | None,
) -> Sequence[mx.array]:
    found: Sequence[mx.array] = extension().muon_direction(
        gradient, momentum, beta, list(polynomials), slack, row_scale, column_scale, extension_precision()
    )
    return found


def _why_not_native(
    gradient: mx.array,
    momentum: mx.array,
    beta: float,
    polynomials: Sequence[Polynomial],
    slack: float,
    row_scale: mx.array | None,
    column_scale: mx.array | None,
) -> str:
    return "" if gradient.dtype == momentum.dtype == mx.float32 else "the kernels read float32"


_MUON_DIRECTION = Operation("muon_direction", _reference, native=(_why_not_native, _native))
