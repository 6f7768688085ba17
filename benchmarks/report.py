"""From pytest-benchmark's JSON to what is committed: benchmarks/results/SUITE.json and its page and picture in docs.

python -m benchmarks.report operations|training build/benchmarks.json [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report_plot import draw

COMMAND = "make bench-{suite}"
# {suite: its page and picture, without their endings}
PAGES = {"operations": "benchmarks", "training": "benchmarks-training"}
HEADER = "| case | implementation | time, ms | speed | of the peak | extra memory, MB | slower than metalens |"
INTRODUCTION = """\
Written by `{command}`; the numbers behind the tables are in `benchmarks/results/{suite}.json`.

- Time: median of the rounds, and in brackets the 20th and 80th percentile. "Slower than metalens": how many times as long the implementation took as
  metalens's did in the same round, likewise; below 1 it was faster. Competitors run in turn, A B C A B C ..., because machines drift: compare ratios,
  not times of different cases.
- "Of the peak": the speed divided by that of bursts right before and right after, on all cores: {peaks}.
- Extra memory: by how much one call raised the peak of a fresh process, beyond its inputs. A few MB more or less are the allocator's.
- PyTorch does the straightforward thing, with a dense unembedding or weight: all logits, log-softmax, KL, autograd. "bf16" is its autocast (for
  matrix products: bfloat16 operands). metalens reads 4-bit weights, groups of 64.
- Every competitor's result was compared with metalens's before it was timed.
- Read the ratios to PyTorch only from a run on an otherwise idle machine (its load before the run is stated): OpenMP's threads wait for each other at
  the end of every loop, so that another process on one of the cores slows PyTorch down more than the rest.
"""


def trimmed(raw: dict[str, Any], suite: str) -> dict[str, Any]:
    """What matters of pytest-benchmark's file: hardware, versions, percentiles; no samples."""
    infos = [benchmark["extra_info"] for benchmark in raw["benchmarks"]]
    machine = raw["machine_info"]
    cpu = machine.get("cpu", {})
    profiles = [info["profile"] for info in infos if "profile" in info]
    result = {
        "date": raw["datetime"][:10],
        "suite": suite,
        "command": COMMAND.format(suite=suite) + (" QUICK=1" if machine["metalens"]["quick"] else ""),
        "machine": {"cpu": cpu.get("brand_raw", machine.get("processor")), "system": f"{machine['system']} {machine['machine']}"}
        | machine["metalens"],
        "profile": profiles[0] if profiles else None,
        "cases": [info for info in infos if "title" in info],
    }
    return rounded(result)


def rounded(value: Any) -> Any:
    """Four digits are more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(p: dict[str, float], scale: float = 1.0) -> str:
    return f"{number(p['p50'] * scale)} ({number(p['p20'] * scale)}–{number(p['p80'] * scale)})"


def speed(amount_per_second: float, unit: str) -> str:
    return f"{number(amount_per_second)} {unit}" if unit == "tokens/s" else f"{number(amount_per_second / 1e9)} G{unit}"


def megabytes(case: dict[str, Any], name: str) -> str:
    extra = case["extra_bytes"].get(name)
    return "" if extra is None else number(extra / 1e6)


def rows(case: dict[str, Any]) -> Iterator[str]:
    """The table's rows of one case: ours, then its peers."""
    of_peak = spread(case["fraction_of_peak"], 100) + " %" if "peak" in case else ""
    own = case["name"]
    yield (
        f"| {case['label']} | **{own}** | {spread(case['seconds'], 1e3)} | {speed(case['speed']['p50'], case['unit'])} | {of_peak} "
        f"| {megabytes(case, own)} | |"
    )
    for name, peer in case["peers"].items():
        rate = speed(case["amount"] / peer["seconds"]["p50"], case["unit"])
        yield f"| | {name} | {spread(peer['seconds'], 1e3)} | {rate} | | {megabytes(case, name)} | {spread(peer['ratio'])} |"


def footnotes(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Who was left out, and why; and notes."""
    for case in cases:
        for name, reason in case["left_out"].items():
            yield f"- {case['label']}: {name} is left out. {reason}"
    yield from dict.fromkeys(f"- {case['note']}" for case in cases if "note" in case)


def machine_lines(results: dict[str, Any]) -> Iterator[str]:
    m = results["machine"]
    yield f"- Measured on {results['date']} with `{results['command']}`."
    yield f"- {m['cpu']}, {m['cores']} cores, {m['system']}; {', '.join(m['instruction_sets'])}. Load before the run: {m['load_before']}."
    yield f"- metalens's kernels: {m['kernels']} (available: {', '.join(m['kernels_available'])})."
    if "peaks" in m:
        named = (f"{name} {number(value / 1e9)} {'GB/s' if 'read' in name else 'GFLOP/s'}" for name, value in m["peaks"].items())
        yield f"- Bursts at the start: {', '.join(named)} ({m['vector_bits']}-bit vectors)."
    yield f"- {', '.join(f'{name} {version}' for name, version in m['versions'].items() if version)}."


def profile_section(profile: dict[str, Any]) -> Iterator[str]:
    native, reference = profile["native"], profile["reference"]
    per_token = 1e3 / profile["tokens"], 1e3 / profile["tokens_reference"]
    yield "## Where a training step spends its time\n"
    yield f"Demo model, one sequence of {profile['tokens']} tokens ({profile['tokens_reference']} on plain MLX), each stage evaluated by itself.\n"
    yield "| stage | metalens, ms per token | share | plain MLX, ms per token | share |\n|---|---|---|---|---|"
    totals = [sum(each["stages"].values()) for each in (native, reference)]
    for stage, seconds in native["stages"].items():
        plain = reference["stages"][stage]
        yield (
            f"| {stage} | {number(seconds * per_token[0])} | {seconds / totals[0]:.0%} | {number(plain * per_token[1])} | {plain / totals[1]:.0%} |"
        )
    yield f"| all in one go, without the optimizer | {number(native['step'] * per_token[0])} | | {number(reference['step'] * per_token[1])} | |\n"
    yield (
        f"In the native kernels: {native['kernel_share']:.0%} of the stages' time ({native['capture_share']:.0%} of the capture's); "
        "the rest is MLX's own operations.\n"
    )


def markdown(results: dict[str, Any]) -> str:
    suite = results["suite"]
    peaks = ", ".join(dict.fromkeys(case["peak"] for case in results["cases"] if "peak" in case))
    parts = [
        "# Benchmarks\n",
        INTRODUCTION.format(command=COMMAND.format(suite=suite), suite=suite, peaks=peaks or "none here"),
        *machine_lines(results),
        "",
    ]
    parts.append(f"![How many times as long the other implementations take]({PAGES[suite]}.png)\n")
    for title in dict.fromkeys(case["title"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["title"] == title]
        parts += [f"## {title}\n", HEADER, "|---" * 7 + "|", *(row for case in cases for row in rows(case)), "", *footnotes(cases), ""]
    if results["profile"] is not None:
        parts += profile_section(results["profile"])
    return "\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(PAGES))
    parser.add_argument("json", type=Path, help="as `pytest --benchmark-json` wrote it")
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder that holds benchmarks/ and docs/")
    arguments = parser.parse_args()
    results = trimmed(json.loads(arguments.json.read_text(encoding="utf-8")), arguments.suite)
    page = PAGES[arguments.suite]
    files = [arguments.out / name for name in (f"benchmarks/results/{arguments.suite}.json", f"docs/{page}.md", f"docs/{page}.png")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    files[1].write_text(markdown(results), encoding="utf-8")
    draw(results, files[2])
    print("Written:", *files)


if __name__ == "__main__":
    main()
