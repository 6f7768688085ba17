"""The influence of a direction on a lens: how far the lens's prediction moves if the direction is ablated.

    energy(v) = mean over positions of KL(lens(h) || lens(h + (replacement - h) v v^T))     (Belrose et al. 2023, section 4.1)

The KL and its gradient come from `lens_kl`, so the logits of all positions are never held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from metalens.analysis.ablation import AblationMode, remove_subspace, replacement_of
from metalens.analysis.sphere import Value
from metalens.lenses.lens import Lens
from metalens.models.unembed import Unembed
from metalens.ops import LensTarget, lens_kl, lens_target
from metalens.readings.rows import lens_rows
from metalens.utils.errors import InvalidValueError


class LensEnergy:
    """The energy of directions at several layers of one lens, over the same positions.

    Args:
        unembed: norm and head of the model.
        lens: the lens.
        rows: {layer: hidden states [N, D] float32}.
        mode: the kind of ablation.
        means: {layer: [D] mean that mode "mean" puts in}. Layers that are not there take the mean of their rows.
        seed: seed of mode "resample".

    Attributes:
        rows: as given.
        replacements: {layer: [N, D] vectors whose part along a direction is put there}.
    """

    def __init__(
        self,
        unembed: Unembed,
        lens: Lens,
        rows: Mapping[int, mx.array],
        mode: AblationMode = "mean",
        means: Mapping[int, np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        self.unembed, self.lens, self.rows = unembed, lens, dict(rows)
        centers = {layer: mx.array(mean.astype(np.float32)) for layer, mean in (means or {}).items()}
        self.replacements = {layer: replacement_of(h, mode, mean=centers.get(layer), seed=seed) for layer, h in self.rows.items()}
        self._targets = {layer: lens_target(self._lens_rows([layer], [h])[0], unembed.head) for layer, h in self.rows.items()}

    def __call__(self, points: Mapping[int, np.ndarray]) -> dict[int, Value]:
        """Return the energy in nats per token, and its gradient [D], of one direction at each of some layers.

        Args:
            points: {layer: unit vector [D]}.

        Raises:
            InvalidValueError: if an energy is not finite.
        """
        layers = list(points)
        vectors = [mx.array(points[layer].astype(np.float32)) for layer in layers]
        target = _joined([self._targets[layer] for layer in layers])
        sizes = [len(self.rows[layer]) for layer in layers]
        cotangent = mx.concatenate([mx.full((size,), 1 / size) for size in sizes])[None]

        def kl(*directions: mx.array) -> list[mx.array]:
            ablated = [remove_subspace(self.rows[layer], v[None], self.replacements[layer]) for layer, v in zip(layers, directions, strict=True)]
            n = mx.concatenate(self._lens_rows(layers, ablated))
            return [lens_kl(n[None], target, self.unembed.head)[0]]

        (found,), gradients = mx.vjp(kl, vectors, [cotangent])
        mx.eval(found, gradients)
        parts = np.split(np.array(found)[0].astype(np.float64), np.cumsum(sizes)[:-1])
        values = {layer: float(part.mean()) for layer, part in zip(layers, parts, strict=True)}
        _require_finite(values)
        return {layer: (values[layer], np.array(g).astype(np.float64)) for layer, g in zip(layers, gradients, strict=True)}

    def of_directions(self, layer: int, vectors: np.ndarray) -> np.ndarray:
        """Return the energies [k] in nats per token of directions [k, D] at one layer, each ablated alone.

        Raises:
            InvalidValueError: if an energy is not finite.
        """
        h, found = self.rows[layer], []
        for vector in vectors:
            ablated = remove_subspace(h, mx.array(vector.astype(np.float32))[None], self.replacements[layer])
            kl, _ = lens_kl(self._lens_rows([layer], [ablated])[0][None], self._targets[layer], self.unembed.head)
            found.append(float(np.array(kl).mean(dtype=np.float64)))
        _require_finite(dict.fromkeys([layer], sum(found)))
        return np.array(found)

    def _lens_rows(self, layers: Sequence[int], hidden: Sequence[mx.array]) -> list[mx.array]:
        """Return the rows [N, D] that the head reads, of hidden states of some layers."""
        pairs = zip(layers, hidden, strict=True)
        return [lens_rows({layer: h}, [layer], self.lens, self.unembed.norm)[0].astype(mx.float32) for layer, h in pairs]


def _joined(targets: Sequence[LensTarget]) -> LensTarget:
    """Return the targets of several sets of rows as one."""
    means = [target.mean for target in targets]
    mean = None if any(m is None for m in means) else mx.concatenate([m for m in means if m is not None])
    n, lse, entropy = (mx.concatenate([getattr(target, name) for target in targets]) for name in ("n", "lse", "entropy"))
    return LensTarget(n, lse, entropy, mean)


def _require_finite(values: Mapping[int, float]) -> None:
    wrong = [layer for layer, value in values.items() if not np.isfinite(value)]
    if wrong:
        raise InvalidValueError(
            f"The energy of a direction is NaN or infinite at layers {wrong}: the model or the lens holds damaged weights, "
            "or the model is float16 and overflows. Convert the model to bfloat16, or load it again."
        )
