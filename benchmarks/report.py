"""Turn pytest-benchmark's JSON into the committed files: benchmarks/results/SUITE.json, and its page and picture in docs.

    python -m benchmarks.report operations|training [build/benchmarks.json] [--out DIR]

Without a JSON file, the page and the picture are written again from the committed results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report_plot import draw

ROOT = Path(__file__).parent.parent
COMMAND = "make bench-{suite}"
# {suite: name of its page and picture, without the suffix}
PAGES = {"operations": "benchmarks", "training": "benchmarks-training"}
HEADER = "| case | implementation | time, ms | speed | of the peak | extra memory, MB | time / metalens's |"
INTRODUCTION = """\
`{command}` wrote this page. The numbers behind the tables are in `benchmarks/results/{suite}.json`.

- "Time" is the median of the rounds, with the 20th and 80th percentile in brackets.
- "Time / metalens's" is the implementation's time divided by metalens's time in the same round: again the median and the percentiles. Below 1, the
  implementation was faster than metalens. Competitors run in turn, A B C A B C ..., because the speed of a machine drifts: compare ratios, not
  times of different cases.
- "Of the peak" is the speed divided by that of bursts just before and just after the call, on all cores. The bursts here are: {peaks}.
- "Extra memory" is the growth of a fresh process's peak during one call, without the inputs. Ignore differences of a few MB: they come from the
  allocator.
- PyTorch computes the textbook way, with a dense unembedding or weight: all logits, log-softmax, KL, autograd. "bf16" is its autocast (for matrix
  products: bfloat16 operands). metalens reads 4-bit weights in groups of 64; "metalens bf16" is its precision 'bfloat16'.
- Every competitor's result was compared with metalens's before the timing.
- Trust the ratios to PyTorch only from a run on an otherwise idle machine (the load before the run is below). OpenMP's threads wait for each other at
  the end of every loop, so another process on one of the cores slows PyTorch more than the other implementations.
"""
# {stage of the training step: its label}
STAGES = {
    "capture": "capture of the hidden states",
    "lens_target": "the model's own rows (lens_target)",
    "translate_norm": "translators and norm (translate_norm)",
    "lens_kl": "head, KL and its gradient (lens_kl)",
    "translator_gradients": "gradients of the translators",
    "optimizer": "optimizer",
}
# {key of the profile in results of version 0.1.0: its key now}; for the committed results, until they are measured again.
FORMER_KEYS = {
    "capture of the streams": "capture",
    **{label: key for key, label in STAGES.items()},
    "capture_share": "capture_kernel_fraction",
    "kernel_share": "kernel_fraction",
}


def trimmed(raw: dict[str, Any], suite: str) -> dict[str, Any]:
    """Reduce pytest-benchmark's file to hardware, versions and percentiles, without the samples."""
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
    """Round every number to four digits, which is more than the accuracy of a measurement."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def number(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(p: dict[str, float], scale: float = 1.0) -> str:
    """Format a median with its percentiles."""
    return f"{number(p['p50'] * scale)} ({number(p['p20'] * scale)}–{number(p['p80'] * scale)})"


def speed(amount_per_second: float, unit: str) -> str:
    """Format a speed with its unit."""
    return f"{number(amount_per_second)} {unit}" if unit == "tokens/s" else f"{number(amount_per_second / 1e9)} G{unit}"


def megabytes(case: dict[str, Any], name: str) -> str:
    """Format the extra memory of a competitor, or return '' if it was not measured."""
    extra = case["extra_bytes"].get(name)
    return "" if extra is None else number(extra / 1e6)


def rows(case: dict[str, Any]) -> Iterator[str]:
    """Yield the table's rows of one case: ours, then its peers."""
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
    """Yield the reasons of the competitors that were left out, and the notes."""
    for case in cases:
        for name, reason in case["left_out"].items():
            yield f"- {case['label']}: {name} is left out. {reason}"
    yield from dict.fromkeys(f"- {case['note']}" for case in cases if "note" in case)


def machine_lines(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that describe the machine and the versions."""
    m = results["machine"]
    yield f"- Measured on {results['date']} with `{results['command']}`."
    yield f"- {m['cpu']}, {m['cores']} cores, {m['system']}; {', '.join(m['instruction_sets'])}. Load before the run: {m['load_before']}."
    yield f"- Kernels of metalens: {m['kernels']} (available: {', '.join(m['kernels_available'])})."
    if "peaks" in m:
        named = (f"{name} {number(value / 1e9)} {'GB/s' if 'read' in name else 'GFLOP/s'}" for name, value in m["peaks"].items())
        yield f"- Bursts at the start: {', '.join(named)} ({m['vector_bits']}-bit vectors)."
    yield f"- {', '.join(f'{name} {version}' for name, version in m['versions'].items() if version)}."


def current_keys(value: Any) -> Any:
    """Replace the keys of version 0.1.0 in a profile."""
    return {FORMER_KEYS.get(key, key): current_keys(each) for key, each in value.items()} if isinstance(value, dict) else value


def profile_section(profile: dict[str, Any]) -> Iterator[str]:
    """Yield the section about the stages of a training step."""
    native, reference = profile["native"], profile["reference"]
    per_token = 1e3 / profile["tokens"], 1e3 / profile["tokens_reference"]
    yield "## Where a training step spends its time\n"
    yield f"Demo model, one sequence of {profile['tokens']} tokens ({profile['tokens_reference']} with plain MLX), each stage evaluated alone.\n"
    yield "| stage | metalens, ms per token | of all stages | plain MLX, ms per token | of all stages |\n|---|---|---|---|---|"
    totals = [sum(each["stages"].values()) for each in (native, reference)]
    for stage, seconds in native["stages"].items():
        plain = reference["stages"][stage]
        yield (
            f"| {STAGES[stage]} | {number(seconds * per_token[0])} | {seconds / totals[0]:.0%} "
            f"| {number(plain * per_token[1])} | {plain / totals[1]:.0%} |"
        )
    steps = [number(each["step"] * scale) for each, scale in zip((native, reference), per_token, strict=True)]
    yield f"| a step in one evaluation, without the optimizer | {steps[0]} | | {steps[1]} | |\n"
    yield (
        f"The native kernels take {native['kernel_fraction']:.0%} of the time of all stages "
        f"({native['capture_kernel_fraction']:.0%} of the capture's). MLX's own operations take the rest.\n"
    )


def markdown(results: dict[str, Any]) -> str:
    """Return the page of a suite's results."""
    suite = results["suite"]
    peaks = ", ".join(dict.fromkeys(case["peak"] for case in results["cases"] if "peak" in case))
    parts = [
        "# Benchmarks\n",
        INTRODUCTION.format(command=COMMAND.format(suite=suite), suite=suite, peaks=peaks or "none"),
        *machine_lines(results),
        "",
    ]
    parts.append(f"![Time of the other implementations divided by metalens's]({PAGES[suite]}.png)\n")
    for title in dict.fromkeys(case["title"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["title"] == title]
        parts += [f"## {title}\n", HEADER, "|---" * 7 + "|", *(row for case in cases for row in rows(case)), "", *footnotes(cases), ""]
    if results["profile"] is not None:
        parts += profile_section(current_keys(results["profile"]))
    return "\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"


def main() -> None:
    """Write the results, the page and the picture of a suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(PAGES))
    parser.add_argument("json", type=Path, nargs="?", help="output of `pytest --benchmark-json` [default: the committed results]")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder that holds benchmarks/ and docs/")
    arguments = parser.parse_args()
    suite, out = arguments.suite, arguments.out
    results_name = f"benchmarks/results/{suite}.json"
    data, page, picture = out / results_name, out / f"docs/{PAGES[suite]}.md", out / f"docs/{PAGES[suite]}.png"
    for folder in (data.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.json is None:
        results = json.loads((ROOT / results_name).read_text(encoding="utf-8"))
    else:
        results = trimmed(json.loads(arguments.json.read_text(encoding="utf-8")), suite)
        data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page.write_text(markdown(results), encoding="utf-8")
    draw(results, picture)
    print("Written:", page, picture)


if __name__ == "__main__":
    main()
