"""What `plan` expects of a run, and what the run takes: `python -m benchmarks.planned [MODEL ...]`.

Each run is a process of one thread, and seconds are those of the CPU, which other work on the machine hardly changes. The results go to
results/planned.json, and the table to docs/real-models.md.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "planned.json"
PAGE, HEADING = ROOT / "docs" / "real-models.md", "## Planned and measured\n"

LENGTH = 128
# {model: (tokens, layers)}; a run of half a minute to two minutes
CASES: dict[str, tuple[int, list[int] | None]] = {
    "demo": (12288, None),
    "smollm2": (4096, [0, 6, 11, 17, 22, 28]),
    "gemma3-270m": (2048, [0, 3, 6, 10, 13, 16]),
}
RECIPES = "ridge", "fast"
MEMORY_WITHIN, TIME_FACTOR = 0.25, 1.5

Entry = dict[str, Any]


def measured(model_name: str, recipe: str) -> Entry:
    """Plan a run, make it, and return {"model", "recipe", "tokens", "planned", "measured", "python"}.

    "planned" and "measured" have the bytes at the peak, and the CPU seconds of the start and after it.
    """
    import metalens
    from metalens import InterpretableModel
    from metalens.models.bundled import TRAINING_TEXT
    from metalens.training import speed_probe

    tokens, layers = CASES[model_name]
    model = InterpretableModel(model_name)
    _ = model.unembed  # its check is a part of the start
    start = time.process_time()
    speed_probe.CLOCK = time.process_time
    settings: dict[str, Any] = {"max_seq_len": LENGTH, "tokens": tokens, "layers": layers}
    plan = metalens.plan(model_name, recipe, measure=True, **settings)
    assert plan.duration is not None
    before = time.process_time()
    metalens.train(model, [TRAINING_TEXT.read_text(encoding="utf-8")], recipe=recipe, **settings)
    seconds = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    planned = {"bytes": plan.total, "start": plan.duration.start, "seconds": plan.duration.total - plan.duration.start}
    speed = speed_probe.measured_speed(plan.facts)
    return {
        "model": model_name,
        "recipe": recipe,
        "tokens": tokens,
        "planned": planned,
        "measured": {"bytes": peak, "start": start, "seconds": seconds},
        "python": speed.python,
    }


def lines() -> Iterator[str]:
    """Yield the section of the page."""
    entries: list[Entry] = json.loads(RESULTS.read_text(encoding="utf-8"))
    yield HEADING
    yield "What `metalens plan` expects for a run of six layers (demo: all), and what it took: the peak of the process, the CPU seconds until the"
    yield "model is loaded and checked, and those of the training. One thread. `python -m benchmarks.planned` measures and writes this table.\n"
    yield "| model | recipe | tokens | memory, MB | | | start, s | | | training, s | | |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    yield "| | | |" + " planned | measured | ratio |" * 3
    for entry in entries:
        cells = [entry["model"], entry["recipe"], f"{entry['tokens']:,}"]
        for name, unit, digits in (("bytes", 1e6, 0), ("start", 1, 1), ("seconds", 1, 1)):
            planned, found = entry["planned"][name], entry["measured"][name]
            cells += [f"{planned / unit:,.{digits}f}", f"{found / unit:,.{digits}f}", f"{planned / found:.2f}"]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield from _targets(entries)


def _ratios(entries: Sequence[Entry], *names: str) -> list[float]:
    """Return planned / measured of every entry, of the sum of some figures."""
    return [sum(entry["planned"][name] for name in names) / sum(entry["measured"][name] for name in names) for entry in entries]


def _targets(entries: Sequence[Entry]) -> Iterator[str]:
    memory, seconds = _ratios(entries, "bytes"), _ratios(entries, "start", "seconds")
    within = all(abs(ratio - 1) <= MEMORY_WITHIN for ratio in memory)
    in_time = all(1 / TIME_FACTOR <= ratio <= TIME_FACTOR for ratio in seconds)
    yield f"- Target: planned memory within {MEMORY_WITHIN:.0%} of the measured one; measured: {_range(memory)}, {'met' if within else 'missed'}."
    yield f"- Target: planned time of the whole run within a factor of {TIME_FACTOR}; measured: {_range(seconds)}, {'met' if in_time else 'missed'}."


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def write_page() -> None:
    """Replace the section of the page, which goes to the next heading or to the end."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(HEADING)
    following = after.partition("\n## ")
    PAGE.write_text(before + "\n".join(lines()) + "\n" + "".join(following[1:]), encoding="utf-8")


@click.command()
@click.argument("models", nargs=-1, type=click.Choice(list(CASES)))
@click.option("--case", nargs=2, hidden=True)
def main(models: tuple[str, ...], case: tuple[str, str] | None) -> None:
    """Measure MODELS, by default all."""
    if case is not None:
        click.echo(json.dumps(measured(*case)))
        return
    entries: list[Entry] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    one_thread = dict.fromkeys(("METALENS_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    for model in models or CASES:
        for recipe in RECIPES:
            command = [sys.executable, "-m", "benchmarks.planned", "--case", model, recipe]
            found = subprocess.run(command, cwd=ROOT, env=os.environ | one_thread, stdout=subprocess.PIPE, check=True, text=True).stdout
            entry = json.loads(found.splitlines()[-1])
            entries = [other for other in entries if (other["model"], other["recipe"]) != (model, recipe)] + [entry]
            click.echo(found.splitlines()[-1])
            RESULTS.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    write_page()


if __name__ == "__main__":
    main()
