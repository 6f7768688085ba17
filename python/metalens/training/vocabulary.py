"""The ids of the vocabulary that a training step compares: all of them, or a sample that is drawn anew for every piece of the text.

The sample is an importance sample. Each id v is in it with a probability pi_v, independently of the others (Poisson sampling), and log pi_v is taken
off its logit, on the model's side and on the lens's alike. So both softmaxes are self-normalized estimates on the same ids: where the lens equals the
model, loss and gradient are exactly 0, and a sample of all ids is the full loss. pi_v = min(1, c w_v), with w a mixture of

* the model's own top-k probabilities, averaged over the piece: what the piece is about, at the price of the model's own rows alone;
* the counts of the ids in the text: where lenses of early layers, which predict little more than frequencies, put their probability;
* a uniform share, without which a logit could count for arbitrarily much.

On SmolLM2-135M this mixture has half the gradient noise of a uniform proposal, and as little as the mean of the model's whole prediction.
A long batch is divided into pieces with a sample each: the same work, and the errors of the pieces average out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from metalens.ops import Head, lens_stats
from metalens.training.config import TrainingConfig, Vocabulary

STREAM = 0x5A3B1E  # sets the random numbers apart from those of the sampler of the text
PIECE = 128  # tokens that share a sample
TOP_K = 8  # probabilities of each token; more of them do not change the noise of the gradient
COUNTED, BLOCK = 1 << 20, 1 << 14  # ids of a long text that are counted, in blocks of so many: a text on disk is not read whole
SHARES = 0.4, 0.4, 0.2  # of the model's probabilities, of the counts and of the uniform share
# With vocabulary = "sampled", 12 sqrt(V) ids of a large vocabulary are in a sample. docs/sampled-vocabulary.md: less than 1 % of the final KL. Of a
# small one, whose products are the smaller part of a step, two thirds are: on the demo model (V = 6,000) 4,000 ids end 0.17 % below 2,048 and take
# 1.2 times as long. Nothing was measured between the two, where the size goes in a line from one to the other.
SMALL, LARGE = 8192, 49_152
SAMPLED, LEAST_SAMPLED = 12, 2048


def sample_size(vocabulary: Vocabulary, tokens: int) -> int | None:
    """Return the expected number of ids in a sample, None for the full vocabulary.

    Args:
        vocabulary: the setting.
        tokens: ids that can be predicted.
    """
    if vocabulary == "full":
        return None
    if vocabulary == "sampled":
        at_small, at_large = (max(LEAST_SAMPLED, 2 * min(tokens, SMALL) // 3), int(SAMPLED * math.sqrt(max(tokens, LARGE))))
        size = int(np.interp(tokens, (SMALL, LARGE), (at_small, at_large)))
    else:
        size = int(vocabulary)
    return None if size >= tokens else size


class VocabularySampler:
    """Draws the ids of every piece of a step.

    The draws depend on nothing but the piece, the settings and the text. So a run that goes on from a checkpoint, and one whose processes divide the
    layers, draw what one uninterrupted process draws. Processes that divide the text draw for the pieces of their own part.

    Args:
        size: expected number of ids in a sample, less than the tokens of the head.
        head: the unembedding.
        ids: the text [tokens], whose ids are counted.
        seed: seed of the run. None = 0.
        rank: number of the process among those that divide the text.
    """

    def __init__(self, size: int, head: Head, ids: np.ndarray, seed: int | None, rank: int = 0) -> None:
        self.size, self.head = size, head
        self._key = [STREAM, int(seed or 0), rank]
        counted = from_all_places(ids)
        counts = np.bincount(counted[counted < head.tokens], minlength=head.tokens)
        self._base = SHARES[1] * counts / max(counts.sum(), 1) + SHARES[2] / head.tokens

    def heads(self, n_model: mx.array, step: int, before: int, part: int | None = None, done: Callable[[], None] = lambda: None) -> Iterator[Head]:
        """Yield the head of sampled rows for every PIECE tokens. Only one of them is in memory, if the caller keeps none.

        Args:
            n_model: [T, D] the model's own rows after the final norm.
            step: number of the step in its pass.
            before: tokens of the step that this process has had before these.
            part: tokens whose rows go through the full head in one evaluation. None = all.
            done: function that is called after each evaluation.
        """
        tokens = n_model.shape[0]
        ids, p = [], []
        for start in range(0, tokens, part or tokens):
            stats = lens_stats(n_model[None, start : start + (part or tokens)], self.head, min(TOP_K, self.head.tokens))
            ids.append(np.array(stats.top_ids[0]))
            p.append(np.array(mx.exp(stats.top_logits - stats.lse[..., None])[0]))
            done()
        top_ids, top_p = np.concatenate(ids), np.concatenate(p)
        for start in range(0, tokens, PIECE):
            drawn = self.sample(top_ids[start : start + PIECE], top_p[start : start + PIECE], step, before + start)
            yield self.head.sampled(*map(mx.array, drawn))

    def sample(self, top_ids: np.ndarray, top_p: np.ndarray, step: int, before: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the ids for a piece.

        Args:
            top_ids: [T, k] most likely ids of every token.
            top_p: [T, k] their probabilities. NaN counts as 0.
            step, before: as in `heads`; they and the seed decide about the random numbers.

        Returns:
            ids [S] int32, ascending, and -log of the probability with which each is in the sample [S] float32.
        """
        w = self._base.copy()
        np.add.at(w, top_ids.ravel(), SHARES[0] / len(top_ids) * np.nan_to_num(top_p, nan=0.0).ravel().astype(np.float64))
        pi = inclusion(w, self.size)
        raw = np.random.PCG64(np.random.SeedSequence([*self._key, step, before])).random_raw(w.size)
        chosen = (raw >> np.uint64(11)) * 2.0**-53 < pi
        ids = np.flatnonzero(chosen)
        return ids.astype(np.int32), -np.log(pi[ids]).astype(np.float32)


def sampler_of(config: TrainingConfig, head: Head, ids: np.ndarray, data_rank: int) -> VocabularySampler | None:
    """Return the sampler of a run, None if its steps compare the full vocabulary. Arguments as of `VocabularySampler`."""
    size = sample_size(config.vocabulary, head.tokens) if config.num_steps else None
    return None if size is None else VocabularySampler(size, head, ids, config.seed, data_rank)


def from_all_places(ids: np.ndarray) -> np.ndarray:
    """Return all ids of a text, or of a long one COUNTED of them, in blocks that are evenly spaced."""
    if ids.size <= COUNTED:
        return np.asarray(ids)
    starts = np.linspace(0, ids.size - BLOCK, COUNTED // BLOCK).astype(np.int64)
    return np.concatenate([ids[start : start + BLOCK] for start in starts])


def inclusion(w: np.ndarray, size: int) -> np.ndarray:
    """Return pi = min(1, c w) with the sum `size`: the probability of each id to be in a sample. The largest is 1, so that no sample is empty.

    Args:
        w: [V] positive weights.
        size: expected size of a sample, from 1 to V.
    """
    sure = np.zeros(w.size, bool)
    sure[np.argmax(w)] = True
    while True:
        c = max(size - np.count_nonzero(sure), 0) / max(w[~sure].sum(), np.finfo(float).tiny)
        more = ~sure & (w * c >= 1)
        if not more.any():
            return np.where(sure, 1.0, w * c)
        sure |= more
