"""What benchmarks/recipes concludes from its results."""

import pytest
from benchmarks.recipes import page, verdicts
from benchmarks.recipes.cases import EIGHTH, FEW, FULL, LONG, LONG_TOKENS, MODELS, SEEDS, TEXTS, cases
from benchmarks.recipes.select import current, layer_ratios, mean_ratios, with_range, with_spread
from benchmarks.targets import Target


def entry(line, kl, *, model="small", text="help", seed=0, variant="", tokens=51_200):
    case = {"model": model, "text": text, "seed": seed, "line": line, "variant": variant, "tokens": tokens, "settings": {}}
    layers = list(range(len(kl)))
    return {"case": case, "layers": layers, "kl": kl, "top1": [0.5] * len(kl), "bias": [0.1] * len(kl)}


def test_a_target_says_whether_it_is_met_and_only_then_what_bounds_it():
    assert str(Target("fast", "1 s", True, "Because.")) == "- Target: fast. Measured: 1 s. **Met.**"
    assert str(Target("fast", "9 s", False, "Because of this.")) == "- Target: fast. Measured: 9 s. **Missed.** Because of this."
    assert str(Target("fast", "9 s", False)) == "- Target: fast. Measured: 9 s. **Missed.**"


def test_layers_that_are_exact_have_no_ratio():
    assert layer_ratios(entry("fast", [1.0, 0.0]), entry("ridge", [2.0, 0.0])) == {0: 0.5}


@pytest.mark.parametrize(("kl", "met"), [([0.9, 1.0], True), ([0.1, 2.1], False)])
def test_one_layer_above_ridge_misses(kl, met):
    target = verdicts.never_above_ridge([entry("fast", kl), entry("ridge", [1.0, 2.0])])
    assert target.met is met
    assert ("layer 1" if not met else "layer 0") in target.measured
    assert ("above it at 1 of 2 layers" in target.measured) is not met


def test_ridge_is_compared_at_the_same_seed_text_and_model():
    others = [entry("ridge", [9.0], seed=1), entry("ridge", [9.0], text="code"), entry("ridge", [9.0], model="demo")]
    assert verdicts.never_above_ridge([entry("fast", [1.0]), *others]) is None
    assert not verdicts.never_above_ridge([entry("fast", [1.0]), *others, entry("ridge", [0.9])]).met


def test_another_recipe_that_is_better_on_one_text_misses():
    found = [entry(line, [kl]) for line, kl in (("fast", 1.0), ("muon", 1.1), ("ridge", 2.0))]
    assert verdicts.below_every_other("small", found).met
    found += [entry(line, [kl], text="code") for line, kl in (("fast", 1.0), ("muon", 0.9), ("ridge", 2.0))]
    target = verdicts.below_every_other("small", found)
    assert not target.met
    assert "1.111 of `muon`'s on `code`" in target.measured


def test_the_former_settings_have_a_line_of_their_own():
    """They are no other recipe. Means over seeds are compared, of seeds that both have."""
    found = [entry(line, [kl]) for line, kl in (("fast", 1.0), ("fast 0.1.0", 0.9), ("muon", 1.1), ("ridge", 2.0))]
    assert verdicts.below_every_other("small", found).met
    target = verdicts.below_its_former("small", found)
    assert not target.met
    assert "1.111 of it on `help`" in target.measured
    found += [entry("fast", [1.0], seed=1), entry("fast 0.1.0", [1.2], seed=1), entry("fast", [0.1], seed=2)]
    assert verdicts.below_its_former("small", found).met
    assert verdicts.below_its_former("small", [entry("fast", [1.0])]) is None


def test_an_eighth_of_papers_tokens_counts_and_not_more():
    paper = entry("paper", [1.0], variant=LONG, tokens=LONG_TOKENS)
    assert verdicts.with_an_eighth("small", [paper, entry("fast", [0.99], tokens=LONG_TOKENS // 8)]).met
    assert not verdicts.with_an_eighth("small", [paper, entry("fast", [1.01], tokens=LONG_TOKENS // 8)]).met
    assert verdicts.with_an_eighth("small", [paper, entry("fast", [0.5], tokens=LONG_TOKENS // 8 + 1)]) is None
    longer = entry("fast", [0.99], variant=EIGHTH)
    assert verdicts.with_an_eighth("small", [paper, entry("fast", [1.01], tokens=43_008), longer]).met
    assert not verdicts.with_an_eighth("small", [paper, longer, entry("fast", [1.03], variant=EIGHTH, seed=1)]).met


def test_the_sampled_vocabulary_may_cost_a_hundredth():
    full = entry("fast", [1.0], variant=FULL)
    assert verdicts.sampled_beside_full("small", [full, entry("fast", [1.009])]).met
    assert not verdicts.sampled_beside_full("small", [full, entry("fast", [1.011])]).met


def test_spreads_and_ratios_over_seeds_and_texts():
    found = [
        entry("fast", [1.0]),
        entry("fast", [1.2], seed=1),
        entry("muon", [2.0]),
        entry("muon", [1.2], seed=1),
        entry("muon", [5.0], text="code"),
    ]
    ratios = mean_ratios(found, "fast", "muon")
    assert ratios == [0.5, 1.0]
    assert with_range(ratios) == "0.75 (0.50–1.00)"
    assert with_spread([1.0, 1.2]) == "1.1000 ± 0.1000"
    assert with_spread([1.0]) == "1.0000"


def test_results_of_a_former_budget_are_left_out():
    case = next(case for case in cases(MODELS["small"]) if case.line == "fast").to_dict()
    now, before = {"case": case}, {"case": {**case, "tokens": 51_200}}
    assert current([before, now]) == [now]


def test_every_model_has_all_lines_on_all_texts_and_seeds():
    for model in MODELS.values():
        found = list(cases(model))
        assert {(case.text, case.seed) for case in found if case.line == "fast" and not case.variant} == {(t, s) for t in TEXTS for s in SEEDS}
        assert len({str(case.to_dict()) for case in found}) == len(found)
        whole, few = ({case.line for case in found if case.variant == variant} for variant in (FULL, FEW))
        assert few == (whole if model.few is not None else set())  # a run with the full vocabulary has a partner with its layers


def test_the_pages_have_every_line_and_the_verdicts():
    kl = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    found = [entry(line, [2 * k for k in kl], model="smollm2") for line in ("ridge", "muon")]
    found += [entry("fast", kl, model="smollm2"), entry("fast", [k + 1 for k in kl], model="smollm2", seed=1)]
    found += [entry("fast", [2.1], model="smollm2", variant=FEW), entry("fast", [2.0], model="smollm2", variant=FULL)]
    shown = page.recipes(found)
    assert "8 layers (all, 0 to 7)" in shown
    assert "| fast | 5.0000 ± 0.5000 |" in shown
    assert "| muon | 9.0000 | 0.50 | 1.00 |" in shown
    assert "reaches 2.0000 on `help` (layers all, 0 to 0) with the full vocabulary, and 2.1000 with the sampled one (+5.00%)" in shown
    layers = page.real_models(found)
    assert "| layer | ridge | fast | muon |" in layers
    assert "| 3 | 10.000 | 5.500 | 10.000 |" in layers
    assert "| fast | 5.5000 | 8.500 (50%, 0.10) | 7.500 (50%, 0.10) |" in layers  # of layers 0, 1, 2, 4, 5 and 6
    assert "| fast, full vocabulary | 2.0000 | 2.000 (50%, 0.10) |" in layers


def test_an_eighth_is_compared_on_the_layers_of_papers_run():
    paper = entry("paper", [1.0], model="smollm2", variant=LONG, tokens=LONG_TOKENS)
    of_all = entry("fast", [1.5, 0.2], model="smollm2", tokens=12_288)
    assert verdicts.with_an_eighth("smollm2", [paper, of_all]) is None
    assert verdicts.with_an_eighth("smollm2", [paper, of_all, entry("fast", [0.9], model="smollm2", variant=FEW, tokens=12_288)]).met
