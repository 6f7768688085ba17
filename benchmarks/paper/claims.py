"""What the paper claims, and whether it holds here. Every verdict is computed from the results; the rule stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalens.analysis import bootstrap_mean, spearman, transfer_correlation

Result = dict[str, Any]
BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Verdict:
    """The figure of one model, and whether the claim holds there.

    Attributes:
        figure: the figure in words.
        holds: whether it holds by the rule of the claim.
    """

    figure: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        experiment: the experiment that it is about.
        title: the claim in a few words.
        paper: what the paper reports.
        rule: when the claim holds here.
        judge: function of the results of one model, one for each seed, that returns the verdict.
    """

    experiment: str
    title: str
    paper: str
    rule: str
    judge: Callable[[Sequence[Result]], Verdict]


# ------------------------------------------------------------------ words


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return [value, low, high] in words."""
    value, low, high = values
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def per_seed(words: Sequence[str]) -> str:
    """Return what each seed gives, in words."""
    return "; ".join(words)


def _mean_over(results: Sequence[Result], *keys: str) -> np.ndarray:
    """Return the mean over seeds of an array at some keys."""
    values = []
    for result in results:
        value: Any = result
        for key in keys:
            value = value[key]
        values.append(np.asarray(value, np.float64))
    return np.mean(values, axis=0)


# ------------------------------------------------------------------ what layers predict


def below_logit(results: Sequence[Result]) -> Verdict:
    """Compare both lenses' cross-entropy at every layer but the last, with intervals over sequences."""
    difference = (_mean_over(results, "tuned", "ce") - _mean_over(results, "logit", "ce"))[:, :-1]
    ends = [bootstrap_mean(column) for column in difference.T]
    below = sum(each.high < 0 for each in ends)
    tuned, logit = (_mean_over(results, name, "ce")[:, :-1].mean() for name in ("tuned", "logit"))
    gain = bootstrap_mean(difference.mean(axis=1))
    figure = f"below at {below} of {len(ends)} layers; mean over layers {tuned:.2f} against {logit:.2f} nats, difference {interval(gain)}"
    return Verdict(figure, below == len(ends))


def unbiased(results: Sequence[Result]) -> Verdict:
    """Compare the bias of both lenses, in bits."""
    tuned, logit = (BITS * _mean_over(results, name)[:-1] for name in ("tuned", "logit"))
    spread = [BITS * float(np.mean(result["tuned"][:-1])) for result in results]
    below = int((tuned < logit).sum())
    figure = f"mean over layers {tuned.mean():.2f} bits (seeds {', '.join(f'{each:.2f}' for each in spread)}) against {logit.mean():.2f}; below at"
    return Verdict(f"{figure} {below} of {len(tuned)} layers", below == len(tuned) and bool(tuned.mean() <= 0.1 * logit.mean()))


def predicts_input(results: Sequence[Result]) -> Verdict:
    """Say at how many layers the logit lens's top token is the input token, more often than not."""
    logit, tuned = (_mean_over(results, name, "input").mean(axis=0) for name in ("logit", "tuned"))
    many = int((logit > 0.5).sum())
    figure = (
        f"logit lens: at {many} of {len(logit)} layers; largest fraction {logit.max():.2f} (layer {logit.argmax()}); tuned lens {tuned.max():.2f}"
    )
    return Verdict(figure, many > len(logit) / 2)


# ------------------------------------------------------------------ transfer


def _penalty(result: Result) -> np.ndarray:
    ce = np.asarray(result["ce"])
    return ce - np.diag(ce)[None, :]


def asymmetric(results: Sequence[Result]) -> Verdict:
    """Compare a late translator on an early layer with the reverse."""
    penalty = np.mean([_penalty(result) for result in results], axis=0)
    late, early = np.tril_indices(len(penalty), -1)
    difference = bootstrap_mean(penalty[late, early] - penalty[early, late])
    means = penalty[late, early].mean(), penalty[early, late].mean()
    figure = f"late translators on early layers {means[0]:.2f} nats, early ones on late layers {means[1]:.2f}; difference {interval(difference)}"
    return Verdict(figure, difference.low > 0)


def similar_layers_transfer(results: Sequence[Result]) -> Verdict:
    """Correlate the similarity of covariances with the transfer penalty."""
    found = [transfer_correlation(np.asarray(result["similarity"]), _penalty(result)) for result in results]
    return Verdict(per_seed([f"ρ = {interval(each)}" for each in found]), all(each.high < 0 for each in found))


# ------------------------------------------------------------------ causes


def _layers(result: Result) -> list[tuple[int, Any]]:
    return sorted(((int(layer), value) for layer, value in result.items()), key=lambda item: item[0])


def faithful(results: Sequence[Result]) -> Verdict:
    """Say at how many layers the influences on lens and model are correlated."""
    rho = [(layer, each["rho"]) for layer, each in _layers(results[0])]
    positive = sum(values[1] > 0 for _, values in rho)
    figure = ", ".join(f"layer {layer}: {interval(values)}" for layer, values in rho)
    return Verdict(f"ρ by layer: {figure}", positive == len(rho))


def faithful_late(results: Sequence[Result]) -> Verdict:
    """Compare the correlation at the first and the last layer."""
    rho = [each["rho"][0] for _, each in _layers(results[0])]
    return Verdict(f"ρ = {rho[0]:.2f} at the first layer examined, {rho[-1]:.2f} at the last", rho[-1] > rho[0])


def aligned(results: Sequence[Result]) -> Verdict:
    """Compare the stimulus-response alignment of both lenses."""
    found = _layers(results[0])
    above = sum(each["tuned"][0] > each["logit"][0] for _, each in found)
    words = ", ".join(f"layer {layer}: {interval(each['tuned'])} against {interval(each['logit'])}" for layer, each in found)
    return Verdict(f"tuned above logit at {above} of {len(found)} layers ({words})", above == len(found))


def aligned_late(results: Sequence[Result]) -> Verdict:
    """Correlate the tuned lens's alignment with depth."""
    found = _layers(results[0])
    rho = spearman([layer for layer, _ in found], [each["tuned"][0] for _, each in found])
    return Verdict(f"rank correlation of layer and alignment {rho:.2f}, over {len(found)} layers", rho > 0.5)


def harmless(results: Sequence[Result]) -> Verdict:
    """Compare the deletion of the first block with that of the others."""
    ce = [each[0] for each in results[0]["ce"]]
    others = np.array(ce[1:])
    worst = int(others.argmax()) + 1
    figure = (
        f"first block {interval(results[0]['ce'][0])} nats; the others: median {np.median(others):.2f}, largest {interval(results[0]['ce'][worst])}"
    )
    return Verdict(f"{figure} (block {worst})", bool(np.median(others) <= 0.1 * ce[0]))


def down_the_gradient(results: Sequence[Result]) -> Verdict:
    """Say how often what a block adds goes against the gradient."""
    logit, model = (np.array([each[0] for each in results[0][name]["negative"]]) for name in ("logit", "model"))
    figure = f"cosine below 0 at {logit.mean():.0%} of positions, by layer {logit.min():.0%} to {logit.max():.0%}"
    return Verdict(f"{figure}; with the model's own loss {model.mean():.0%}", bool(logit.mean() >= 0.95))


def small_cosine(results: Sequence[Result]) -> Verdict:
    """Say how large the mean cosines are."""
    logit, model = (np.array([each[0] for each in results[0][name]["cosine"]]) for name in ("logit", "model"))
    figure = f"mean cosine by layer {logit.min():.3f} to {logit.max():.3f}; with the model's own loss {model.min():.3f} to {model.max():.3f}"
    return Verdict(figure, bool(np.abs(logit).max() <= 0.05))


# ------------------------------------------------------------------ predictions


def deep_is_late(results: Sequence[Result]) -> Verdict:
    """Correlate prediction depth and iteration learned."""
    words = [f"ρ = {interval(each['tuned'])}" for each in results]
    return Verdict(f"{per_seed(words)}, {results[0]['examples']} positions", all(each["tuned"][1] > 0 for each in results))


def tuned_depth_is_better(results: Sequence[Result]) -> Verdict:
    """Compare both lenses' correlations."""
    words = [f"{interval(each['tuned'])} against {interval(each['logit'])}" for each in results]
    return Verdict(per_seed(words), all(each["tuned"][0] > each["logit"][0] for each in results))


def overthinks(results: Sequence[Result]) -> Verdict:
    """Compare the best layer with the model, after false demonstrations."""
    tuned = results[0]["tuned"]
    figure = f"true demonstrations {tuned['true'][-1]:.2f}, false {tuned['false'][-1]:.2f}; best layer {tuned['best_layer']} is better by"
    return Verdict(f"{figure} {interval(tuned['gain'])}", tuned["gain"][1] > 0)


def detects(results: Sequence[Result]) -> Verdict:
    """Say how well trajectories through the tuned lens tell injected prompts."""
    best = [max(each["tuned"].items(), key=lambda item: item[1][0]) for each in results]
    words = [f"{interval(values)} ({method})" for method, values in best]
    return Verdict(f"AUROC {per_seed(words)}", all(values[0] >= 0.99 for _, values in best))


def detects_better(results: Sequence[Result]) -> Verdict:
    """Compare both lenses and the baseline."""
    best = {name: [max(values[0] for values in each[name].values()) for each in results] for name in ("tuned", "logit", "hidden")}
    words = [f"{name} {', '.join(f'{value:.2f}' for value in values)}" for name, values in best.items()]
    return Verdict(f"AUROC {per_seed(words)}", all(t >= x for t, x in zip(best["tuned"], best["logit"], strict=True)))


def no_better_weights(results: Sequence[Result]) -> Verdict:
    """Compare the coherence of weights read through both lenses."""
    found = _layers(results[0])
    clear = sum(each["difference"][1] > 0 for _, each in found)
    tuned, logit = (np.mean([each[name] for _, each in found]) for name in ("tuned", "logit"))
    figure = f"mean coherence {tuned:.4f} (tuned) against {logit:.4f} (logit); tuned clearly above at {clear} of {len(found)} layers"
    return Verdict(figure, clear <= len(found) / 2)


ZERO = "the 95 % interval of"
CLAIMS = (
    Claim(
        "perplexity",
        "The tuned lens is better than the logit lens at every layer",
        "Figures 4, 5 and 14: a lower perplexity at every layer, for every family of models.",
        f"{ZERO} the difference of the cross-entropies, over sequences, lies below 0 at every layer but the last.",
        below_logit,
    ),
    Claim(
        "bias",
        "The tuned lens is nearly unbiased",
        "Figure 3, GPT-Neo-2.7B: the logit lens has a bias of 4 to 5 bits at most layers, the tuned lens nearly none.",
        "the bias is below the logit lens's at every layer but the last, and on average at most a tenth of it.",
        unbiased,
    ),
    Claim(
        "perplexity",
        "The logit lens predicts the input token at most layers",
        "Figure 17, BLOOM-560M: at more than half of the layers the logit lens's top token is often the input token. A fault of that family.",
        "at more than half of the layers the logit lens's top token is the input token at most positions.",
        predicts_input,
    ),
    Claim(
        "transfer",
        "Late translators on early layers are worse than the reverse",
        "Figure 7, Pythia-12B: the penalty is higher where a translator of layer 5 or later, with rogue dimensions, reads a layer before it.",
        f"{ZERO} the difference of both penalties, over pairs of layers, lies above 0.",
        asymmetric,
    ),
    Claim(
        "transfer",
        "Similar layers read each other well",
        "Figures 6 and 7, Pythia-12B: Spearman's ρ of covariance similarity and transfer penalty is -0.78.",
        f"{ZERO} ρ, over layers, lies below 0.",
        similar_layers_transfer,
    ),
    Claim(
        "fidelity",
        "What matters to the lens matters to the model",
        "Figures 8 and 20, Pythia-410M: ρ of the influences of directions on lens and model is 0.89 at layer 18, and positive at every layer.",
        f"{ZERO} ρ, over directions, lies above 0 at every layer examined.",
        faithful,
    ),
    Claim(
        "fidelity",
        "Late layers are more faithful",
        "Figure 20: ρ rises from 0.25 at the embedding to 0.98 at the last layer.",
        "ρ at the last layer examined is above ρ at the first.",
        faithful_late,
    ),
    Claim(
        "alignment",
        "The tuned lens foresees the model's response better",
        "Figure 9, Pythia-160M: stimulus and response are more aligned for the tuned lens than for the logit lens, at every layer.",
        "the similarity is above the logit lens's at every layer examined.",
        aligned,
    ),
    Claim(
        "alignment",
        "The alignment rises with depth",
        "Figure 9.",
        "the rank correlation of layer and similarity is above 0.5.",
        aligned_late,
    ),
    Claim(
        "deletion",
        "A block can be deleted, but the first",
        "Figure 19, Pythia-6.9B: to delete any block but the first is nearly harmless.",
        "the median rise of the cross-entropy is at most a tenth of that of the first block.",
        harmless,
    ),
    Claim(
        "gradient",
        "Blocks go down the gradient",
        "Figure 19: the cosine of what a block adds and the gradient is negative at least 95 % of the time.",
        "it is negative at 95 % of the positions or more, as a mean over layers. The loss is the logit lens's, as in the paper's code.",
        down_the_gradient,
    ),
    Claim(
        "gradient",
        "The cosine is small",
        "Figure 19: it is about 0.05 at most.",
        "no layer's mean cosine is larger than 0.05 in size.",
        small_cosine,
    ),
    Claim(
        "difficulty",
        "What is learned late is predicted deep",
        "Table 2: prediction depth and iteration learned are positively correlated on all 11 tasks.",
        f"{ZERO} ρ, over sequences, lies above 0 for every seed.",
        deep_is_late,
    ),
    Claim(
        "difficulty",
        "The tuned lens's depth tells more",
        "Table 2: ρ is higher than with the logit lens on 8 of 11 tasks.",
        "ρ is higher for every seed.",
        tuned_depth_is_better,
    ),
    Claim(
        "false_demonstrations",
        "A middle layer overthinks less",
        "Figure 11: after false demonstrations a middle layer answers better than the last one.",
        f"{ZERO} the gain of the best layer, over questions, lies above 0. The layer is chosen on the same questions, which favors the claim.",
        overthinks,
    ),
    Claim(
        "injection",
        "Trajectories tell injected prompts",
        "Table 1, Pythia-12B: an AUROC of 0.99 to 1.00 with the tuned lens on most tasks.",
        "the AUROC of the better detector is 0.99 or more for every seed.",
        detects,
    ),
    Claim(
        "injection",
        "The tuned lens detects better than the logit lens",
        "Table 1: on most tasks. The baseline on hidden states is about as good as the tuned lens.",
        "the AUROC of the better detector is at least the logit lens's for every seed.",
        detects_better,
    ),
    Claim(
        "weights",
        "The tuned lens makes weights hardly more readable",
        "Table 3: clearly for Pythia-125M only.",
        f"{ZERO} the difference of the coherence, over rows, lies above 0 at no more than half of the layers examined.",
        no_better_weights,
    ),
)
