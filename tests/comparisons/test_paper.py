"""The reproduction's verdicts follow from its results: planted results give the verdict that they must, and the page has every claim."""

import re
from pathlib import Path

import numpy as np
import pytest
from benchmarks.paper import claims, page
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.experiments import EXPERIMENTS, case, cases
from benchmarks.paper.subjects import MODELS

LAYERS, SEQUENCES = 5, 6


def lenses(logit, tuned):
    """Results of both lenses: a constant at every layer and sequence, with a little noise."""
    rng = np.random.default_rng(0)
    constant = {"logit": logit, "tuned": tuned}
    found = {name: {key: (value + 0.01 * rng.normal(size=(SEQUENCES, LAYERS))).tolist() for key in ("ce", "kl")} for name, value in constant.items()}
    return found | {"model_ce": [2.0] * SEQUENCES}


def transfer(similarity_sign, late, early):
    """A transfer whose penalty is `late` times the distance of the layers where the translator is the later one, else `early` times it."""
    distance = np.abs(np.subtract.outer(np.arange(8), np.arange(8))).astype(float)
    penalty = np.where(np.tri(8, k=-1) > 0, late, early) * distance
    return {"ce": (3 + penalty).tolist(), "similarity": (1 - 0.1 * similarity_sign * distance).tolist()}


def gradient(negative, cosine):
    """A gradient whose figures are those of the logit lens's loss. The model's own would give the other verdict."""
    logit = {"negative": [[negative, 0, 1]] * 3, "cosine": [[cosine, -1, 1], [0.01, -1, 1]]}
    return {"logit": logit, "model": {"negative": [[1 - negative, 0, 1]] * 3, "cosine": [[-0.24 - cosine, -1, 1]] * 3}}


def by_layer(**values):
    return {str(layer): {name: value[i] for name, value in values.items()} for i, layer in enumerate((0, 10, 2))}


PLANTED = {
    claims.below_logit: ([lenses(5, 4)], [lenses(4, 5)]),
    claims.unbiased: ([{"logit": [4.0] * 5, "tuned": [0.1] * 5}], [{"logit": [4.0] * 5, "tuned": [1.0] * 5}]),
    claims.predicts_input: (
        [{name: {"input": [[0.9, 0.9, 0.9, 0, 0]] * 2} for name in ("logit", "tuned")}],
        [{name: {"input": [[0.9, 0.4, 0.4, 0, 0]] * 2} for name in ("logit", "tuned")}],
    ),
    claims.asymmetric: ([transfer(1, 0.5, 0.1)], [transfer(1, 0.1, 0.5)]),
    claims.similar_layers_transfer: ([transfer(1, 0.2, 0.2)], [transfer(-1, 0.2, 0.2)]),
    claims.faithful: ([by_layer(rho=[[0.5, 0.2, 0.7]] * 3)], [by_layer(rho=[[0.5, 0.2, 0.7], [0.3, -0.1, 0.6], [0.5, 0.2, 0.7]])]),
    # Layer 10 is the last one: layers are numbers, not texts.
    claims.faithful_late: ([by_layer(rho=[[0.2, 0, 1], [0.9, 0, 1], [0.1, 0, 1]])], [by_layer(rho=[[0.5, 0, 1], [0.2, 0, 1], [0.9, 0, 1]])]),
    claims.aligned: (
        [by_layer(tuned=[[0.5, 0, 1]] * 3, logit=[[0.4, 0, 1]] * 3)],
        [by_layer(tuned=[[0.5, 0, 1]] * 3, logit=[[0.4, 0, 1], [0.6, 0, 1], [0.4, 0, 1]])],
    ),
    claims.aligned_late: (
        [by_layer(tuned=[[0.1, 0, 1], [0.9, 0, 1], [0.5, 0, 1]])],
        [by_layer(tuned=[[0.9, 0, 1], [0.1, 0, 1], [0.5, 0, 1]])],
    ),
    claims.harmless: ([{"ce": [[5, 4, 6], [0.1, 0, 1], [0.3, 0, 1]]}], [{"ce": [[5, 4, 6], [0.9, 0, 1], [0.8, 0, 1]]}]),
    claims.down_the_gradient: (
        [gradient(negative=0.97, cosine=-0.04)],
        [gradient(negative=0.6, cosine=-0.04)],
    ),
    claims.small_cosine: (
        [gradient(negative=0.6, cosine=-0.04)],
        [gradient(negative=0.97, cosine=-0.2)],
    ),
    claims.deep_is_late: (
        [{"tuned": [0.4, 0.3, 0.5], "examples": 9}] * 2,
        [{"tuned": [0.4, 0.3, 0.5], "examples": 9}, {"tuned": [0.1, -0.1, 0.2], "examples": 9}],
    ),
    claims.tuned_depth_is_better: (
        [{"tuned": [0.4, 0.3, 0.5], "logit": [0.2, 0.1, 0.3]}],
        [{"tuned": [0.1, 0.0, 0.5], "logit": [0.2, 0.1, 0.3]}],
    ),
    claims.overthinks: (
        [{"tuned": {"true": [0.9], "false": [0.5], "best_layer": 1, "gain": [0.2, 0.1, 0.3]}}],
        [{"tuned": {"true": [0.9], "false": [0.5], "best_layer": 1, "gain": [0.2, -0.1, 0.3]}}],
    ),
    claims.detects: ([{"tuned": {"a": [0.5, 0, 1], "b": [0.995, 0.9, 1]}}], [{"tuned": {"a": [0.5, 0, 1], "b": [0.98, 0.9, 1]}}]),
    claims.detects_better: (
        [{"tuned": {"a": [0.9, 0, 1]}, "logit": {"a": [0.8, 0, 1]}, "hidden": {"c": [1.0, 0, 1]}}],
        [{"tuned": {"a": [0.8, 0, 1]}, "logit": {"a": [0.9, 0, 1]}, "hidden": {"c": [1.0, 0, 1]}}],
    ),
    claims.no_better_weights: (
        [by_layer(tuned=[0.1] * 3, logit=[0.1] * 3, difference=[[0.0, -0.1, 0.1], [0.1, 0.05, 0.2], [0.0, -0.1, 0.1]])],
        [by_layer(tuned=[0.1] * 3, logit=[0.1] * 3, difference=[[0.1, 0.05, 0.2]] * 3)],
    ),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.title)
def test_planted_results_give_the_verdict_that_they_must(claim):
    holding, failing = PLANTED[claim.judge]
    assert claim.judge(holding).holds is True
    assert claim.judge(failing).holds is False


def test_an_interval_that_reaches_zero_does_not_hold():
    close = lenses(5, 5)
    assert not claims.below_logit([close]).holds
    assert re.search(r"below at \d of 4 layers", claims.below_logit([close]).figure)


def entries(claim, results):
    budget = MODELS[EXPERIMENTS[claim.experiment].models[0]]
    return [
        {"case": case(EXPERIMENTS[claim.experiment], budget, seed), "core_seconds": 36.0, "result": result}
        for seed, result in zip(budget.seeds, results, strict=False)
    ]


def test_the_page_has_every_claim_with_its_verdict_and_what_was_not_run():
    claim = next(each for each in CLAIMS if each.judge is claims.unbiased)
    text = page.paper(entries(claim, PLANTED[claim.judge][1]))
    for each in CLAIMS:
        assert f"\n## {each.title}\n" in text
        assert f"(#{page._anchor(each.title)})" in text
    assert f"| smollm2, seed 0 | {claim.judge(PLANTED[claim.judge][1]).figure} | **does not hold** |" in text
    assert text.count("Not run.\n") == len(CLAIMS) - 1
    assert "0 of 1 verdicts are that the claim holds." in text
    assert f"1 of {len(cases(list(MODELS), list(EXPERIMENTS)))} runs, 0.0 core hours" in text
    assert "- Not run on smollm2, seed 1: `perplexity`, `bias`" in text


def test_the_committed_page_is_that_of_the_committed_results():
    import json

    root = Path(__file__).parents[2]
    current = cases(list(MODELS), list(EXPERIMENTS))
    found = [entry for entry in json.loads((root / "benchmarks" / "results" / "paper.json").read_text()) if entry["case"] in current]
    assert (root / "docs" / "paper.md").read_text() == page.paper(found)
