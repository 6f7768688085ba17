"""docs/time-to-quality.md, written from the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.competitor import PLAIN, TORCH, TORCH_BF16
from benchmarks.recipes.cases import LONG_TOKENS, MODELS
from benchmarks.recipes.select import Entry, mean
from benchmarks.targets import Target
from benchmarks.time_to_quality.search import FORMER, OURS, UPSTREAM, Results, former, mark_of, ours, paper_seconds, runs_of
from benchmarks.time_to_quality.visits import FORMER_CLOSED, FORMER_COMMIT, FORMER_VERSION, LEFT_OUT, STEP_COST, Measured, Visit

TIMES_TORCH, TIMES_FORMER, STEP_BESIDE_FORWARD = 40, 5, 2
# {name of runs of version 0.1.0: what they are, for the pages}
NAMES = {
    FORMER: f"`{FORMER}` with the full vocabulary, on today's kernels",
    FORMER_VERSION: f"{FORMER_VERSION} (commit {FORMER_COMMIT}) with its recipe `fast`",
}
# How the former version is installed, word for word.
INSTALL_FORMER = f"""git worktree add --detach ../former {FORMER_COMMIT}
python3 -m venv ../former/.venv
../former/.venv/bin/python -m pip install ../former
python -m benchmarks.time_to_quality --former ../former/.venv/bin/python"""
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
        "- tuned-lens 0.2.0, upstream, runs its lens under `torch.autocast(..., dtype=torch.bfloat16)` on every device, a CPU too",
        "  (`scripts/train_loop.py`), and its model in the type of the checkpoint (`precision` is `auto`). So *PyTorch bf16*, with lens and",
        "  model under autocast, is what upstream does. *PyTorch float32* is beside it: it is faster where a CPU has no bfloat16",
        "  instructions, and rounds nothing.",
        "- A run's core seconds are those of the training call, its tokenization, warm start, checks and closed form included. What is",
        "  charged to PyTorch and plain MLX are steps alone. Imports and the loading of the model are charged to nobody.",
        "- Core seconds are user and system time of all threads. They were measured in one session on one machine, each in a process of",
        f"  its own on {threads} ({here.get('system')}, kernels `{here.get('kernels')}`). Other work ran on the machine, which makes core",
        "  seconds longer: compare ratios. The last column says how many measurements a figure is the median of.",
        "- `fast 0.1.0` has the settings of version 0.1.0 and the full vocabulary, on today's kernels.",
        *_about_former(results),
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


def _about_former(results: Results) -> Iterator[str]:
    """Yield how version 0.1.0 itself was installed, if there are runs of it."""
    if not any(runs_of(results, model, FORMER_VERSION, "full") for model in MODELS):
        return
    yield f"- {FORMER_VERSION} is commit {FORMER_COMMIT}, with its own kernels and the division of tokens of its own demo: 12,288 tokens of warm"
    yield "  start, 2/7 of a smaller budget, then steps of 128 tokens. Today's code reads its lens on held-out text. Installed and run by:\n"
    yield from (f"        {line}" for line in INSTALL_FORMER.splitlines())
    yield ""


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
    yield from (f"{competitor} takes no part: {reason}.\n" for (of_model, competitor), reason in LEFT_OUT.items() if of_model == model)
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
    steps = results.models[model][UPSTREAM]
    yield f"{len(runs[0][1].kl)} layers, {MODELS[model].held_out:,} held-out tokens. `paper` has not been run with {LONG_TOKENS:,} tokens, so the"
    yield f"mark is not known. {UPSTREAM} would take {total:,.0f} core seconds for it ({_rounds(steps)}).\n"
    yield f"| metalens | tokens | KL | core seconds | fewer than {UPSTREAM}, if the mark is not below this KL | extra memory, MB |"
    yield "|---|---:|---:|---:|---:|---:|"
    for wanted, found in sorted(runs, key=lambda run: run[1].seconds):
        cells = [f"`{wanted.name}`", f"{wanted.tokens:,}", f"{mean(found.kl):.4f}", f"{found.seconds:,.0f}", f"{total / found.seconds:.0f} times"]
        yield "| " + " | ".join([*cells, f"{max(found.extra_bytes) / 1e6:,.0f}"]) + " |"
    yield ""


def rows(results: Results, model: str, mark: float) -> Iterator[Row]:
    """Yield the lines of a model's table, metalens's cheapest run that reaches the mark first."""
    best = ours(results, model, mark)
    assert best is not None
    yield _row_of_run(f"metalens, `{best[0].name}`", *best)
    for name, words in (
        (FORMER, f"metalens, `{FORMER}`, full vocabulary"),
        (FORMER_VERSION, f"{FORMER_VERSION} (commit {FORMER_COMMIT}), `fast`"),
        (FORMER_CLOSED, f"{FORMER_VERSION}, `num_steps=0`: its closed form"),
    ):
        reached = former(results, model, mark, name)
        if reached is not None:
            yield _row_of_run(words, *reached)
        elif runs := runs_of(results, model, name, "full"):
            tokens, found = max(runs.items())
            yield _row_of_run(f"{words} (does not reach the mark)", Visit(model, name, tokens, "full"), found)
    tokens = best[0].tokens
    for competitor in (TORCH, TORCH_BF16, PLAIN):
        steps = results.get(Visit(model, competitor))
        if steps is not None:
            of_run, kl, recipe = (tokens, mean(best[1].kl), "metalens's run") if competitor == PLAIN else (LONG_TOKENS, mark, "`paper`")
            yield Row(f"{competitor}, {recipe}", of_run, kl, steps.seconds * of_run, max(steps.extra_bytes), _rounds(steps))


def _row_of_run(name: str, wanted: Visit, found: Measured) -> Row:
    rounds = len(found.core_seconds)
    return Row(name, wanted.tokens, mean(found.kl), found.seconds, max(found.extra_bytes), f"{rounds} run{'s' if rounds > 1 else ''}")


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
            (NAMES[FORMER], None if mark is None else beside_former(results, model, mark)),
            ("a sampled vocabulary and the full one at equal time", below_full_at_equal_time(results, model)),
        ):
            if target is None:
                yield f"{model}, {what}"


def beside_torch(results: Results, model: str, mark: float) -> Target | None:
    """Compare core seconds with the paper's recipe in PyTorch: the verdict is about bfloat16 under autocast, which upstream does."""
    run, total = ours(results, model, mark), paper_seconds(results, model)
    if run is None or total is None:
        return None
    times = total / run[1].seconds
    fewer, cheaper = LONG_TOKENS / run[0].tokens, total / LONG_TOKENS / (run[1].seconds / run[0].tokens)
    measured = f"{times:.0f} times fewer than {UPSTREAM} ({fewer:.1f} times fewer tokens, each {cheaper:.1f} times cheaper)"
    wide = paper_seconds(results, model, TORCH)
    if wide is not None:
        measured += f", {wide / run[1].seconds:.0f} times fewer than {TORCH}"
    wanted = f"{model}: at least {TIMES_TORCH} times fewer core seconds than the paper's recipe in PyTorch as upstream runs it (bf16)"
    return Target(wanted, measured, times >= TIMES_TORCH, _bound(results, model, run[0].tokens, total))


def _bound(results: Results, model: str, tokens: int, total: float) -> str:
    """Say what would be left if a step cost no more than the forward pass that it needs."""
    cost = results.get(Visit(model, STEP_COST))
    if cost is None:
        return ""
    most = total / (cost.forward_seconds * tokens)
    forward = f"A forward pass alone takes {cost.forward_seconds * 1e3:.2f} core milliseconds a token in float32"
    return f"{forward}: with these tokens, steps that cost nothing else would bring {most:.0f} times."


def beside_former(results: Results, model: str, mark: float) -> Target | None:
    """Compare core seconds with version 0.1.0 if it was run, else with its settings and the full vocabulary."""
    run = ours(results, model, mark)
    name = FORMER_VERSION if runs_of(results, model, FORMER_VERSION, "full") else FORMER
    runs, theirs = runs_of(results, model, name, "full"), former(results, model, mark, name)
    if run is None or not runs:
        return None
    wanted = f"{model}: at least {TIMES_FORMER} times fewer core seconds than {NAMES[name]}"
    if theirs is None:
        tokens, most = max(runs.items())
        times = most.seconds / run[1].seconds
        measured = f"more than {times:.1f} times: with {tokens:,} tokens it ends at {mean(most.kl):.4f}, above the mark"
        return Target(wanted, measured, times >= TIMES_FORMER, "Longer runs of it were not made.")
    times = theirs[1].seconds / run[1].seconds
    per_token = theirs[1].seconds / theirs[0].tokens / (run[1].seconds / run[0].tokens)
    bound = f"Its tokens cost {per_token:.1f} times as much, and it needs {theirs[0].tokens / run[0].tokens:.1f} times as many."
    closed = former(results, model, mark, FORMER_CLOSED)
    beside = "" if closed is None else f", {closed[1].seconds / run[1].seconds:.1f} times fewer than its closed form (`num_steps=0`)"
    return Target(wanted, f"{times:.1f} times{beside}", times >= TIMES_FORMER, bound)


def step_beside_forward(results: Results, model: str) -> Target | None:
    """Compare a step of `fast` with a forward pass."""
    cost = results.get(Visit(model, STEP_COST))
    if cost is None or MODELS[model].few is None:
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
