"""docs/time-to-quality.md, written from the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.competitor import PLAIN, TORCH, TORCH_BF16
from benchmarks.recipes.cases import LONG_TOKENS, MODELS
from benchmarks.recipes.select import Entry, mean
from benchmarks.targets import Target
from benchmarks.time_to_quality.search import FORMER, OURS, Results, former, mark_of, ours, paper_seconds, runs_of
from benchmarks.time_to_quality.visits import STEP_COST, Measured, Visit

TIMES_TORCH, TIMES_FORMER, STEP_BESIDE_FORWARD = 40, 5, 2
EQUAL_TIME = 1.03  # core seconds of two runs that count as equal


@dataclass(frozen=True)
class Row:
    """A line of a model's table.

    Attributes:
        name: the implementation and its recipe.
        tokens: training tokens.
        kl: held-out KL of the lens.
        seconds: core seconds.
        extra_bytes: peak memory beyond the loaded model.
        how: how the core seconds are known.
    """

    name: str
    tokens: int
    kl: float
    seconds: float
    extra_bytes: float
    how: str


def page(results: Results, comparison: Sequence[Entry]) -> str:
    """Return the page."""
    here = results.machine
    threads = f"one of {here.get('cores')} cores" if here.get("threads") == 1 else f"{here.get('threads')} of {here.get('cores')} cores"
    parts = [
        "# Time to quality\n",
        f"How many core seconds it takes from nothing to a lens that is as good as that of the recipe `paper` with {LONG_TOKENS:,} tokens.",
        "Quality is the mean KL(model || lens) of the trained layers on held-out text, by the full vocabulary, in nats per token. That of",
        "`paper` is the *mark*.\n",
        "`python -m benchmarks.time_to_quality` wrote this page.\n",
        "- Runs of metalens are real runs: from text to lens. A search over budgets of tokens finds the cheapest run that reaches the mark.",
        "- Whole runs of PyTorch and plain MLX would take hours. Their steps are measured, and multiplied by tokens: those of the mark for",
        "  PyTorch, those of metalens's own run for plain MLX.",
        "- PyTorch runs the paper's recipe as tuned-lens does, in float32, or in bfloat16 under autocast. A CPU without bfloat16",
        "  instructions emulates the latter.",
        "- Core seconds are user and system time of all threads. They were measured in one session on one machine, each in a process of",
        f"  its own on {threads} ({here.get('system')}, kernels `{here.get('kernels')}`). Other work ran on the machine, which makes core",
        "  seconds longer: compare ratios. The last column says how many measurements a figure is the median of.",
        "- `fast 0.1.0` has the settings of version 0.1.0 and the full vocabulary, on today's kernels, which are faster than those of 0.1.0.",
        "- The mark is that of metalens's own `paper`, with a sampled vocabulary ([Recipes compared](recipes.md)). With the full one, the",
        "  run would take hours on a pretrained model; that page compares the two at fewer tokens.",
        "- Extra memory is the growth of the process's peak beyond the loaded model.\n",
        "![KL against core seconds, of metalens and of PyTorch](time-to-quality.png)\n",
        "## What was to be shown\n",
        *map(str, targets(results, comparison)),
        *(f"- {what}: not measured." for what in unmeasured(results, comparison)),
        "",
    ]
    for model in MODELS:
        parts += _of_model(results, comparison, model)
    return "\n".join(parts).rstrip() + "\n"


def _of_model(results: Results, comparison: Sequence[Entry], model: str) -> Iterator[str]:
    mark = mark_of(model, comparison)
    if mark is None:
        yield from _without_mark(results, model)
        return
    best = ours(results, model, mark)
    if best is None:
        return
    yield f"## {model}\n"
    layers = len(best[1].kl)
    yield f"{layers} layers, {MODELS[model].held_out:,} held-out tokens. The mark is {mark:.4f} nats.\n"
    yield "| implementation | tokens | KL | core seconds | beside metalens | extra memory, MB | core seconds known by |"
    yield "|---|---:|---:|---:|---:|---:|---|"
    for row in rows(results, model, mark):
        cells = [row.name, f"{row.tokens:,}", f"{row.kl:.4f}", f"{row.seconds:,.0f}", f"{row.seconds / best[1].seconds:.1f}"]
        yield "| " + " | ".join([*cells, f"{row.extra_bytes / 1e6:,.0f}", row.how]) + " |"
    yield ""
    cost = results.get(Visit(model, STEP_COST))
    if cost is not None:
        yield _step_sentence(cost) + "\n"


def _without_mark(results: Results, model: str) -> Iterator[str]:
    """Yield what is known of a model before `paper` has been run on its whole budget: the ratio for every mark that a run of metalens reaches."""
    total = paper_seconds(results, model)
    runs = [(Visit(model, name, tokens), found) for name in OURS for tokens, found in runs_of(results, model, name).items()]
    if total is None or not runs:
        return
    yield f"## {model}\n"
    steps = results.models[model][TORCH]
    yield f"{len(runs[0][1].kl)} layers, {MODELS[model].held_out:,} held-out tokens. `paper` has not been run with {LONG_TOKENS:,} tokens, so the"
    yield f"mark is not known. PyTorch would take {total:,.0f} core seconds for it ({_rounds(steps)}).\n"
    yield "| metalens | tokens | KL | core seconds | fewer than PyTorch, if the mark is not below this KL | extra memory, MB |"
    yield "|---|---:|---:|---:|---:|---:|"
    for wanted, found in sorted(runs, key=lambda run: run[1].seconds):
        cells = [f"`{wanted.name}`", f"{wanted.tokens:,}", f"{mean(found.kl):.4f}", f"{found.seconds:,.0f}", f"{total / found.seconds:.0f} times"]
        yield "| " + " | ".join([*cells, f"{max(found.extra_bytes) / 1e6:,.0f}"]) + " |"
    yield ""


def rows(results: Results, model: str, mark: float) -> Iterator[Row]:
    """Yield the lines of a model's table, metalens's cheapest run that reaches the mark first."""
    reached = [run for run in (ours(results, model, mark), former(results, model, mark)) if run is not None]
    for wanted, found in reached:
        rounds = len(found.core_seconds)
        name = f"metalens, `{wanted.name}`" + ("" if wanted.vocabulary == "sampled" else ", full vocabulary")
        yield Row(name, wanted.tokens, mean(found.kl), found.seconds, max(found.extra_bytes), f"{rounds} run{'s' if rounds > 1 else ''}")
    if not any(wanted.name == FORMER for wanted, _ in reached):
        for tokens, found in list(runs_of(results, model, FORMER, "full").items())[-1:]:
            name = f"metalens, `{FORMER}`, full vocabulary (does not reach the mark)"
            yield Row(name, tokens, mean(found.kl), found.seconds, max(found.extra_bytes), "1 run")
    tokens = reached[0][0].tokens
    for competitor in (TORCH, TORCH_BF16, PLAIN):
        steps = results.get(Visit(model, competitor))
        if steps is not None:
            of_run, kl, recipe = (tokens, mean(reached[0][1].kl), "metalens's run") if competitor == PLAIN else (LONG_TOKENS, mark, "`paper`")
            yield Row(f"{competitor}, {recipe}", of_run, kl, steps.seconds * of_run, max(steps.extra_bytes), _rounds(steps))


def _rounds(steps: Measured) -> str:
    rounds = len(steps.core_seconds)
    return f"{steps.seconds * 1e3:,.1f} ms a token in {rounds} round{'s' if rounds > 1 else ''} of steps"


def _step_sentence(cost: Measured) -> str:
    return (
        f"A step of `fast` on all layers (512 tokens) takes {cost.seconds * 1e3:.2f} core milliseconds a token, a forward pass with the model's own "
        f"logits {cost.forward_seconds * 1e3:.2f}: {1 / cost.seconds:,.0f} and {1 / cost.forward_seconds:,.0f} tokens a core second, "
        f"{cost.seconds / cost.forward_seconds:.2f} times as long."
    )


# ---------------------------------------------------------------------- targets


def targets(results: Results, comparison: Sequence[Entry]) -> list[Target]:
    """Return the targets whose figures are known."""
    found: list[Target | None] = []
    for model in MODELS:
        mark = mark_of(model, comparison)
        if mark is not None:
            found += [beside_torch(results, model, mark), beside_former(results, model, mark)]
        found += [step_beside_forward(results, model), below_full_at_equal_time(results, model)]
    return [target for target in found if target is not None]


def unmeasured(results: Results, comparison: Sequence[Entry]) -> Iterator[str]:
    """Yield what has no verdict yet."""
    for model in ("demo", "small", "smollm2"):
        mark = mark_of(model, comparison)
        for what, target in (
            ("the paper's recipe in PyTorch", None if mark is None else beside_torch(results, model, mark)),
            (f"`{FORMER}` with the full vocabulary", None if mark is None else beside_former(results, model, mark)),
            ("a sampled vocabulary and the full one at equal time", below_full_at_equal_time(results, model)),
        ):
            if target is None:
                yield f"{model}, {what}"


def beside_torch(results: Results, model: str, mark: float) -> Target | None:
    """Compare core seconds with the paper's recipe in PyTorch, in its faster type."""
    run = ours(results, model, mark)
    totals = {name: seconds for name in (TORCH, TORCH_BF16) if (seconds := paper_seconds(results, model, name)) is not None}
    if run is None or not totals:
        return None
    name = min(totals, key=lambda each: totals[each])
    times = totals[name] / run[1].seconds
    fewer, cheaper = LONG_TOKENS / run[0].tokens, totals[name] / LONG_TOKENS / (run[1].seconds / run[0].tokens)
    measured = f"{times:.0f} times fewer than {name} ({fewer:.1f} times fewer tokens, each {cheaper:.1f} times cheaper)"
    wanted = f"{model}: at least {TIMES_TORCH} times fewer core seconds than the paper's recipe in PyTorch"
    return Target(wanted, measured, times >= TIMES_TORCH, _bound(results, model, run[0].tokens, totals[name]))


def _bound(results: Results, model: str, tokens: int, total: float) -> str:
    """Say what would be left if a step cost no more than the forward pass that it needs."""
    cost = results.get(Visit(model, STEP_COST))
    if cost is None:
        return ""
    most = total / (cost.forward_seconds * tokens)
    forward = f"A forward pass alone takes {cost.forward_seconds * 1e3:.2f} core milliseconds a token"
    return f"{forward}: with these tokens, steps that cost nothing else would bring {most:.0f} times."


def beside_former(results: Results, model: str, mark: float) -> Target | None:
    """Compare core seconds with the settings of version 0.1.0 and the full vocabulary."""
    run, theirs = ours(results, model, mark), former(results, model, mark)
    wanted = f"{model}: at least {TIMES_FORMER} times fewer core seconds than `{FORMER}` with the full vocabulary"
    if run is None:
        return None
    if theirs is None:
        failed = runs_of(results, model, FORMER, "full")
        if not failed:
            return None
        tokens, most = max(failed.items())
        times = most.seconds / run[1].seconds
        measured = f"more than {times:.1f} times: with {tokens:,} tokens it ends at {mean(most.kl):.4f}, above the mark"
        return Target(wanted, measured, times >= TIMES_FORMER, "Longer runs of it were not made.")
    times = theirs[1].seconds / run[1].seconds
    per_token = theirs[1].seconds / theirs[0].tokens / (run[1].seconds / run[0].tokens)
    bound = f"Its tokens cost {per_token:.1f} times as much, and it needs {theirs[0].tokens / run[0].tokens:.1f} times as many."
    return Target(wanted, f"{times:.1f} times", times >= TIMES_FORMER, bound)


def step_beside_forward(results: Results, model: str) -> Target | None:
    """Compare a step of `fast` with a forward pass."""
    cost = results.get(Visit(model, STEP_COST))
    if cost is None or MODELS[model].trained is None:
        return None
    ratio = cost.seconds / cost.forward_seconds
    wanted = f"{model}: a training step of all layers takes at most {STEP_BESIDE_FORWARD} times the forward pass with the model's own logits"
    return Target(wanted, f"{ratio:.2f} times, in steps of 512 tokens", ratio <= STEP_BESIDE_FORWARD)


def below_full_at_equal_time(results: Results, model: str) -> Target | None:
    """Compare `fast` with the full vocabulary with the longest run with a sampled one that takes no more core seconds."""
    full = runs_of(results, model, "fast", "full").get(MODELS[model].tokens)
    if full is None:
        return None
    within = {n: run for n, run in runs_of(results, model, "fast").items() if run.core_seconds[0] <= full.core_seconds[0] * EQUAL_TIME}
    if not within:
        return None
    tokens, sampled = max(within.items())
    measured = (
        f"{mean(sampled.kl):.4f} with {tokens:,} tokens in {sampled.core_seconds[0]:.0f} core seconds, "
        f"{mean(full.kl):.4f} with {MODELS[model].tokens:,} in {full.core_seconds[0]:.0f}"
    )
    return Target(f"{model}: at equal time a sampled vocabulary ends below the full one", measured, mean(sampled.kl) < mean(full.kl))
