"""Experiments on what trajectories and weights tell: difficulty, overthinking, injected prompts, and rows of the MLP."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmarks.paper.checkpoints import STEPS, trained
from benchmarks.paper.subjects import ROOT, Subject

from metalens.analysis import (
    Difficulty,
    bootstrap_mean,
    checkpoint_predictions,
    detect_anomalies,
    hidden_features,
    iteration_learned,
    overthinking,
    read_questions,
    read_weights,
    score_choices,
    text_depths,
    text_predictions,
)

# Sentiment of reviews, made of templates by examples/prompt_injection.py; in the second file with an order to answer wrongly.
REVIEWS, INJECTED = ROOT / "examples" / "reviews.jsonl", ROOT / "examples" / "reviews_injected.jsonl"
ASKED = 48  # questions after demonstrations
SHOTS = 6
DETECTORS = ("local-outlier-factor", "isolation-forest")
BASELINE = "relative-mahalanobis"  # on hidden states, as in the paper
MLP_ROWS = range(48)


def difficulty(subject: Subject) -> dict[str, Any]:
    """Correlate prediction depth with the iteration learned: {"logit", "tuned": [rho, low, high], "examples"}."""
    texts = [np.array(ids).tolist() for ids in subject.sequences]
    learned = iteration_learned(checkpoint_predictions(trained(subject.seed), text_predictions(texts)), STEPS)
    found: dict[str, Any] = {"examples": len(learned), "steps": list(STEPS)}
    for name, lens in (("logit", None), ("tuned", subject.lens)):
        depth, groups = text_depths(subject.model, texts, lens)
        found[name] = list(Difficulty(depth, learned, groups).correlation(seed=subject.seed))
    return found


def false_demonstrations(subject: Subject) -> dict[str, Any]:
    """Ask questions after true and false demonstrations: accuracy by layer, the model's own last.

    Returns:
        {"logit", "tuned": {"true", "false": [L + 1], "best_layer", "gain": [value, low, high]}}; "gain" is the accuracy of the best layer after
        false demonstrations, less that of the model.
    """
    asked = read_questions(REVIEWS)
    found = {}
    for name, lens in (("logit", None), ("tuned", subject.lens)):
        each = overthinking(subject.model, asked, lens, shots=SHOTS, limit=ASKED, seed=subject.seed)
        layer, gain = each.best_layer(seed=subject.seed)
        accuracies = {kind: getattr(each, kind).correct().mean(axis=1).tolist() for kind in ("true", "false")}
        found[name] = {**accuracies, "best_layer": layer, "gain": list(gain)}
    return found


def injection(subject: Subject) -> dict[str, Any]:
    """Detect injected prompts by trajectories, and by hidden states.

    Returns:
        {"logit", "tuned": {detector: [auroc, low, high]}, "hidden": {detector: ...}, "normal", "anomalous": numbers of prompts}.
    """
    normal, anomalous = read_questions(REVIEWS), read_questions(INJECTED)
    found: dict[str, Any] = {"normal": len(normal), "anomalous": len(anomalous)}
    for name, lens in (("logit", None), ("tuned", subject.lens)):
        features = [score_choices(subject.model, prompts, lens).features() for prompts in (normal, anomalous)]
        found[name] = {method: list(detect_anomalies(*features, method, seed=subject.seed).auroc) for method in DETECTORS}
    hidden = [hidden_features(subject.model, [prompt.context for prompt in prompts]) for prompts in (normal, anomalous)]
    found["hidden"] = {BASELINE: list(detect_anomalies(*hidden, BASELINE, seed=subject.seed).auroc)}
    return found


def weights(subject: Subject) -> dict[str, Any]:
    """Read rows of the MLPs through both lenses: {layer: {"logit", "tuned": mean coherence, "difference": [value, low, high]}}."""
    layers = subject.chosen_layers(last=False)
    readings = [read_weights(subject.model, lens, layers=layers, rows=MLP_ROWS, top_k=10) for lens in (None, subject.lens)]
    found = {}
    for logit, tuned in zip(*readings, strict=True):
        difference = bootstrap_mean(tuned.coherence - logit.coherence, seed=subject.seed)
        means = {"logit": float(logit.coherence.mean()), "tuned": float(tuned.coherence.mean())}
        found[str(logit.layer)] = {**means, "difference": list(difference)}
    return found
