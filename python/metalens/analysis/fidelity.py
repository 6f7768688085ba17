"""Causal fidelity: whether the directions that a lens depends on are those that the model depends on (Belrose et al. 2023, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalens.analysis.ablation import ablate_subspace
from metalens.analysis.causal_basis import CausalBasis
from metalens.analysis.interventions import Effect, Intervention, measure_effects
from metalens.analysis.lens_energy import LensEnergy
from metalens.analysis.resampling import Interval, bootstrap, spearman
from metalens.analysis.sequences import hidden_rows, sequences_of
from metalens.evaluation.text import EvaluationText
from metalens.lenses.lens import Lens, as_lens
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel


@dataclass(frozen=True)
class Fidelity:
    """The causal fidelity of one layer of a lens.

    Attributes:
        layer: the block after which the directions are ablated.
        lens_influence: for each direction the mean KL(lens || lens with it ablated), nats per token.
        model_influence: for each direction the effect of its ablation on the model's own prediction.
        correlation: Spearman's rank correlation of both influences, with a bootstrap interval over directions.
    """

    layer: int
    lens_influence: list[float]
    model_influence: list[Effect]
    correlation: Interval


def causal_fidelity(
    model: LanguageModel,
    text: EvaluationText,
    bases: Mapping[int, CausalBasis],
    lens: Lens | str | Path | None = None,
    *,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> list[Fidelity]:
    """Ablate each direction in the lens and in the running model, and correlate the influences on both.

    Cost: one forward pass of the text for each direction of each layer.

    Args:
        model: the model.
        text: as in `metalens.evaluate`; best not the text that the bases are from.
        bases: {layer: basis}. Mean ablation puts in the means of the bases, here and there.
        lens: the lens that the bases are of. None = the logit lens.
        max_seq_len, max_tokens, bos: as in `extract_causal_bases`.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap and of mode "resample".
        show_progress: show a progress bar on stderr.

    Returns:
        one entry for each layer, in the order of `bases`.

    Raises:
        InvalidValueError: for an empty text, a lens or bases of another model.
    """
    the_lens = as_lens(lens)
    check_lens(the_lens, model)
    sequences = sequences_of(model, text, max_seq_len=max_seq_len, max_tokens=max_tokens, bos=bos)
    interventions = {
        (layer, j): Intervention({layer: ablate_subspace(vector, basis.mode, mean=basis.mean, seed=seed)})
        for layer, basis in bases.items()
        for j, vector in enumerate(basis.vectors)
    }
    effects = measure_effects(model, sequences, interventions, resamples=resamples, seed=seed, show_progress=show_progress)
    found = []
    for layer, basis in bases.items():
        rows = hidden_rows(model, sequences, [layer])
        energy = LensEnergy(model.unembed, the_lens, rows, basis.mode, {layer: basis.mean}, seed)
        of_lens = energy.of_directions(layer, basis.vectors)
        of_model = [effects[layer, j] for j in range(len(basis))]
        found.append(Fidelity(layer, of_lens.tolist(), of_model, _correlation(of_lens, of_model, resamples, seed)))
    return found


def _correlation(of_lens: np.ndarray, of_model: list[Effect], resamples: int, seed: int) -> Interval:
    kl = np.array([effect.kl.value for effect in of_model])
    return bootstrap(lambda chosen: spearman(of_lens[chosen], kl[chosen]), len(kl), resamples=resamples, seed=seed)
