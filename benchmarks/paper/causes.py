"""Experiments that change the running model: causal bases, stimulus and response, deleted blocks, and the gradient."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.subjects import LENGTH, WORK, Subject

from metalens.analysis import (
    SearchOptions,
    causal_fidelity,
    delete_blocks,
    extract_causal_bases,
    gradient_alignment,
    measure_effects,
    stimulus_response_alignment,
)
from metalens.models import bundled

SEARCH = SearchOptions(starts=4, max_evaluations=24)  # a search that ends early gives a direction all the same


def fidelity(subject: Subject) -> dict[str, Any]:
    """Extract causal bases on the training text, and ablate them in the lens and the model on the held-out text.

    Returns:
        {layer: {"lens": [k], "model": [k] influences in nats, "rho": [value, low, high]}}.
    """
    budget, layers = subject.budget, subject.chosen_layers()
    tokens = budget.held_out // 4
    bases = extract_causal_bases(
        subject.model,
        bundled.TRAINING_TEXT.read_text(encoding="utf-8"),
        subject.lens,
        directions=budget.directions,
        layers=layers,
        max_seq_len=LENGTH,
        max_tokens=tokens,
        options=SEARCH,
        folder=WORK / "bases" / f"{budget.name}-{budget.tokens}-{tokens}-seed{subject.seed}",
    )
    found = causal_fidelity(subject.model, subject.text, bases, subject.lens, max_seq_len=LENGTH, max_tokens=tokens, seed=subject.seed)
    return {
        str(each.layer): {"lens": each.lens_influence, "model": [effect.kl.value for effect in each.model_influence], "rho": list(each.correlation)}
        for each in found
    }


def alignment(subject: Subject) -> dict[str, Any]:
    """Compare the change of a lens's prediction with that of the model's, after a change of the hidden states.

    Returns:
        {layer: {"logit", "tuned": [similarity, low, high]}}.
    """
    sequences = subject.budget.held_out // 64
    found = stimulus_response_alignment(
        subject.model, subject.text, subject.lens, layers=subject.chosen_layers(last=False), seq_len=64, max_sequences=sequences, seed=subject.seed
    )
    return {str(each.layer): {name: list(lens.similarity) for name, lens in each.lenses.items()} for each in found}


def deletion(subject: Subject) -> dict[str, Any]:
    """Delete every block in turn: {"ce": [L][value, low, high]}, the rise of the model's cross-entropy in nats."""
    interventions = {block: delete_blocks([block]) for block in range(subject.model.num_layers)}
    effects = measure_effects(subject.model, subject.sequences[: max(2, len(subject.sequences) // 2)], interventions, seed=subject.seed)
    return {"ce": [list(effects[block].ce) for block in interventions]}


def gradient(subject: Subject) -> dict[str, Any]:
    """Compare what each block adds with the gradient of a loss at its input.

    Returns:
        {"logit", "model": {"cosine", "negative", "sequence": [L][value, low, high]}}: the loss of the logit lens, as in the paper's code, and that
        of the model.
    """
    found = {}
    for name, of in (("logit", "lens"), ("model", "model")):
        each = gradient_alignment(subject.model, subject.text, of=of, max_seq_len=LENGTH, max_tokens=subject.budget.held_out // 2, seed=subject.seed)
        values = {"cosine": "cosine", "negative": "negative", "sequence": "sequence_cosine"}
        found[name] = {key: [list(getattr(block, value)) for block in each] for key, value in values.items()}
    return found
