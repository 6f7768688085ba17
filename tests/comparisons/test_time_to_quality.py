"""What benchmarks/time_to_quality searches for, and what it concludes."""

import pytest
from benchmarks.competitor import PLAIN, TORCH, TORCH_BF16
from benchmarks.recipes.cases import LONG, LONG_TOKENS, MODELS
from benchmarks.time_to_quality import page
from benchmarks.time_to_quality.search import (
    CLOSE,
    FORMER,
    GRID_UNIT,
    Results,
    equal_time,
    explore,
    former,
    headline,
    mark_of,
    ours,
    runs_of,
    smallest_budget,
)
from benchmarks.time_to_quality.visits import FORMER_CLOSED, FORMER_VERSION, LEFT_OUT, STEP_COST, Measured, Visit
from hypothesis import given
from hypothesis import strategies as st

TOKENS = MODELS["small"].tokens
BUDGETS = (3_072, 6_144, 12_288, 24_576)


def run(seconds, kl, extra=1e6):
    return Measured([seconds], [extra], [kl])


@pytest.fixture
def results(tmp_path):
    found = Results(tmp_path / "results.json")
    found.machine = {"cores": 2, "threads": 1, "system": "Linux", "kernels": "avx2"}
    for wanted, measured in (
        (Visit("small", "ridge", 12_800), run(3, 2.0)),
        (Visit("small", "fast", TOKENS), run(16, 1.1)),
        (Visit("small", "fast", 51_200), run(20, 0.9)),
        (Visit("small", "fast", 102_400), run(44, 0.8)),
        (Visit("small", "fast", TOKENS, "full"), run(46, 0.95)),
        (Visit("small", FORMER, 51_200, "full"), run(70, 0.99)),
        (Visit("small", TORCH), Measured([0.002, 0.004, 0.003], [2e6])),
        (Visit("small", TORCH_BF16), Measured([0.001, 0.0025, 0.0025], [2e6])),
        (Visit("small", PLAIN), Measured([0.05], [3e6])),
        (Visit("small", STEP_COST), Measured([0.0006], forward=[0.0002])),
    ):
        found.add(wanted, measured)
    return found


@pytest.fixture
def comparison():
    case = {"model": "small", "text": "help", "seed": 0, "line": "paper", "variant": LONG, "tokens": LONG_TOKENS, "settings": {}}
    return [{"case": case, "layers": [0, 1], "kl": [1.5, 0.5]}]


@given(needed=st.integers(1, 30_000))
def test_the_search_finds_a_budget_close_to_the_smallest(needed):
    tried = []

    def reaches(budget):
        tried.append(budget)
        return budget >= needed

    found = smallest_budget(reaches, BUDGETS)
    if needed > BUDGETS[-1]:
        assert found is None
        return
    assert found >= needed
    assert found == BUDGETS[0] or found <= needed * CLOSE + GRID_UNIT
    assert len(tried) == len(set(tried)) <= len(BUDGETS) + 3


def test_the_file_of_results_keeps_every_visit(results):
    results.add(Visit("small", "fast", 51_200), run(30, 0.9))
    again = Results(results._path)
    assert again.machine == results.machine
    assert again.get(Visit("small", "fast", 51_200)).core_seconds == [20, 30]
    assert again.get(Visit("small", "fast", 51_200)).seconds == 25
    assert again.get(Visit("demo", "fast", 51_200)) is None


def test_runs_are_told_apart_by_recipe_vocabulary_and_tokens(results):
    assert list(runs_of(results, "small", "fast")) == [TOKENS, 51_200, 102_400]
    assert list(runs_of(results, "small", "fast", "full")) == [TOKENS]
    assert list(runs_of(results, "small", FORMER, "full")) == [51_200]


def test_the_cheapest_run_must_reach_the_mark(results, comparison):
    assert mark_of("small", comparison) == 1.0
    assert mark_of("demo", comparison) is None
    assert ours(results, "small", 1.0)[0] == Visit("small", "fast", 51_200)
    assert ours(results, "small", 2.0)[0] == Visit("small", "ridge", 12_800)
    assert ours(results, "small", 0.1) is None
    assert former(results, "small", 0.9) is None


def test_slow_runs_are_not_repeated(results):
    names = [wanted.name for wanted in headline(results, "small", 1.0)]
    assert names == ["fast", FORMER, TORCH, TORCH_BF16, PLAIN, STEP_COST]
    results.add(Visit("small", FORMER, 51_200, "full"), run(1e5, 0.99))
    assert FORMER not in [wanted.name for wanted in headline(results, "small", 1.0)]


def test_equal_time_takes_the_tokens_that_the_full_vocabulary_leaves(results):
    measured = []

    def measure(wanted):
        measured.append(wanted)
        return results.get(wanted) or run(45, 0.85)

    _, sampled = equal_time("small", measure)
    assert sampled.tokens == TOKENS * 46 // 16 // GRID_UNIT * GRID_UNIT
    assert measured[-1] == sampled


def test_verdicts_follow_from_the_medians(results, comparison):
    beside_torch, beside_former, _ = page.targets(results, comparison)
    assert beside_torch.met
    assert "51 times fewer than PyTorch bf16 (8.0 times fewer tokens" in beside_torch.measured  # 0.0025 s x 409,600 = 1,024 s, beside 20 s
    assert "61 times fewer than PyTorch float32" in beside_torch.measured
    assert not beside_former.met
    assert "3.5 times" in beside_former.measured
    results.add(Visit("small", TORCH_BF16), Measured([0.001, 0.001, 0.001]))
    missed = page.beside_torch(results, "small", 1.0)
    assert not missed.met
    assert "steps that cost nothing else would bring" in str(missed)


def test_a_full_vocabulary_is_compared_at_equal_time_only(results):
    target = page.below_full_at_equal_time(results, "small")
    assert target.met
    assert "0.8000 with 102,400 tokens" in target.measured
    results.add(Visit("small", "fast", 204_800), run(500, 0.1))
    assert "0.8000" in page.below_full_at_equal_time(results, "small").measured


def test_without_a_mark_the_page_says_what_each_run_would_be_worth(results):
    text = page.page(results, [])
    assert "| `fast` | 51,200 | 0.9000 | 20 | 51 times | 1 |" in text
    assert "PyTorch bf16 would take 1,024 core seconds" in text
    assert "- small, the paper's recipe in PyTorch: not measured." in text
    assert "- small, a sampled vocabulary and the full one at equal time: not measured." not in text
    assert "times fewer core seconds than the paper's recipe" not in text


def test_the_page_has_a_row_for_everyone(results, comparison):
    text = page.page(results, comparison)
    assert "| metalens, `fast` | 51,200 | 0.9000 | 20 | 1.0 |" in text
    assert "| PyTorch float32, `paper` | 409,600 | 1.0000 | 1,229 | 61.4 |" in text
    assert "| plain MLX, metalens's run | 51,200 | 0.9000 | 2,560 | 128.0 |" in text
    assert "3.00 times as long" in text


def test_version_0_1_0_itself_decides_once_it_was_run(results, comparison):
    assert "today's kernels" in page.beside_former(results, "small", 1.0).wanted
    assert "git worktree" not in page.page(results, comparison)
    results.add(Visit("small", FORMER_VERSION, 43_008, "full"), run(70, 1.2))
    failed = page.beside_former(results, "small", 1.0)
    assert "(commit 95c24b2)" in failed.wanted
    assert "more than 3.5 times: with 43,008 tokens it ends at 1.2000, above the mark" in failed.measured
    assert not failed.met
    results.add(Visit("small", FORMER_VERSION, 81_920, "full"), run(130, 0.98))
    met = page.beside_former(results, "small", 1.0)
    assert met.met
    assert met.measured == "6.5 times"
    results.add(Visit("small", FORMER_CLOSED, 51_200, "full"), run(25, 0.98))
    assert page.beside_former(results, "small", 1.0).measured == "6.5 times, 1.2 times fewer than its closed form (`num_steps=0`)"
    text = page.page(results, comparison)
    assert "| metalens 0.1.0, `num_steps=0`: its closed form | 51,200 | 0.9800 | 25 | 1.2 |" in text
    assert "| metalens 0.1.0 (commit 95c24b2), `fast` | 81,920 | 0.9800 | 130 | 6.5 |" in text
    assert "| metalens, `fast 0.1.0`, full vocabulary | 51,200 | 0.9900 | 70 | 3.5 |" in text
    assert "git worktree add --detach ../former 95c24b2" in text


def test_the_search_runs_version_0_1_0_only_where_it_is_installed():
    for with_former in (False, True):
        names = set()

        def measure(wanted, names=names):
            names.add(wanted.name)
            return run(10, 0.5)

        explore("small", 1.0, measure, with_former)
        assert (FORMER_VERSION in names) == (FORMER_CLOSED in names) == with_former
        assert FORMER in names


def test_what_takes_no_part_is_not_visited_and_has_its_reason_on_the_page(results, comparison, monkeypatch):
    monkeypatch.setitem(LEFT_OUT, ("small", PLAIN), "it would take a day")
    assert PLAIN not in [wanted.name for wanted in headline(results, "small", 1.0)]
    assert "\nplain MLX takes no part: it would take a day.\n" in page.page(results, comparison)
