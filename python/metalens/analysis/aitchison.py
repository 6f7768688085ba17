"""Aitchison geometry of predictions: differences of log-probabilities, weighted by a prediction.

Predictions are compositions: only the ratios of their probabilities count. The weighted Aitchison inner product of two compositions p and q
with the weights w, sum w = 1, is (Egozcue and Pawlowsky-Glahn 2016; Belrose et al. 2023, section 4.2)

    <p, q>_w = sum_v w_v log(p_v / g(p)) log(q_v / g(q)),    log g(p) = sum_v w_v log p_v.

Adding a constant to all log-probabilities changes nothing, so logits and differences of logits will do.
"""

from __future__ import annotations

import mlx.core as mx

from metalens.ops import Head, head_logits
from metalens.ops.chunks import in_chunks
from metalens.utils.errors import InvalidValueError


def aitchison_inner(a: mx.array, b: mx.array, weights: mx.array) -> mx.array:
    """Compute the weighted Aitchison inner product over the last axis. Lazy.

    Args:
        a, b: [..., V] log-probabilities, logits, or differences of them.
        weights: [..., V] weights with the sum 1.

    Returns:
        [...] float32.
    """
    a, b, w = (x.astype(mx.float32) for x in (a, b, weights))
    # Only one side must be centered: sum w (b - mean of b) is 0. Both are, because rounding is relative to their size.
    return mx.sum(w * _centered(a, w) * _centered(b, w), axis=-1)


def aitchison_similarity(a: mx.array, b: mx.array, weights: mx.array) -> mx.array:
    """Compute the cosine of two compositions in weighted Aitchison geometry, -1 to 1; NaN if one of them is uniform. Lazy.

    Args:
        a, b, weights: as in `aitchison_inner`.
    """
    return aitchison_inner(a, b, weights) / mx.sqrt(aitchison_inner(a, a, weights) * aitchison_inner(b, b, weights))


def _centered(x: mx.array, w: mx.array) -> mx.array:
    return x - mx.sum(w * x, axis=-1, keepdims=True)


def change_similarity(
    stimulus: tuple[mx.array, mx.array], response: tuple[mx.array, mx.array], head: Head, *, mean_weights: bool = False
) -> mx.array:
    """Compute the Aitchison similarity of two changes of predictions, a chunk of rows at a time. Lazy.

    Args:
        stimulus: [N, D] rows before and after the first change, after the final norm.
        response: [N, D] rows before and after the second change.
        head: the unembedding of all rows.
        mean_weights: weight tokens by the mean of the second prediction before and after its change, as tuned-lens's v0.0.3 does. False =
            by the prediction before it, as the paper does.

    Returns:
        [N] cosines, -1 to 1; NaN where one of the changes is none.

    Raises:
        InvalidValueError: if the rows have different shapes.
    """
    rows = [*stimulus, *response]
    if any(each.ndim != 2 or each.shape != rows[0].shape for each in rows):
        raise InvalidValueError(f"Two changes need four arrays of rows of one shape [N, D], got {[each.shape for each in rows]}.")

    def chunk(n: mx.array) -> list[mx.array]:
        before, after, own, changed = (head_logits(each, head) for each in n)
        weights = mx.softmax(own, axis=-1)
        if mean_weights:
            weights = (weights + mx.softmax(changed, axis=-1)) / 2
        possible = weights > 0  # padding, and tokens that an offset rules out, have logits of -inf, whose difference is NaN
        first, second = (mx.where(possible, b - a, 0) for a, b in ((before, after), (own, changed)))
        return [aitchison_similarity(first, second, weights)[None]]

    return in_chunks(chunk, mx.stack(rows).astype(mx.float32), [], 4 * head.vocab_size)[0][0]
