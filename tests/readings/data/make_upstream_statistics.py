"""Writes upstream_statistics.json beside it, and prints the table of docs/how-to/trajectories.md.

pip install torch==2.13.0 transformers tuned-lens
PYTHONPATH=python:tests python tests/readings/data/make_upstream_statistics.py
"""

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from support import upstream_statistics as upstream


def rounded(values):
    """Return an array as lists whose numbers have the digits of a float32."""
    values = np.asarray(values)
    return values.tolist() if values.dtype.kind in "ib" else np.vectorize(lambda v: float(f"{v:.9g}"))(values).tolist()


def table(found):
    """Return the lines of the table, from {model: (metalens, NumPy, tuned-lens)}."""

    def line(groups, name, theirs, note=""):
        values = [(ours[g][name], exact[g][name], other[g][name]) for ours, exact, other in found.values() for g in groups]
        largest = max(float(np.abs(exact).max()) for _, exact, _ in values)
        errors = [max(upstream.error(v[0], v[i]) for v in values) for i in (1, 2)]
        return f"| `{name}`{note} | `{theirs}` | {largest:.3g} | {errors[0]:.1g} | {errors[1]:.1g} |"

    yield "| statistic | in tuned-lens | largest value | from float64 NumPy | from tuned-lens |"
    yield "|---|---|---|---|---|"
    for name, theirs in upstream.UPSTREAM.items():
        yield line(upstream.LENSES, name, theirs)
    for name, theirs in upstream.UPSTREAM_COMPARISON.items():
        yield line(["comparison"], name, theirs, " of two lenses")


def main():
    found = {}
    for name in upstream.CONFIGS:
        with TemporaryDirectory() as folder:
            upstream.save(Path(folder), name)
            found[name] = [read(Path(folder)) for read in (upstream.of_metalens, upstream.of_numpy, upstream.of_tuned_lens)]
    of_tuned_lens = {name: {group: {key: rounded(a) for key, a in known.items()} for group, known in of[2].items()} for name, of in found.items()}
    versions = {package: version(package) for package in ("tuned-lens", "torch", "transformers")}
    upstream.RECORDED.write_text(json.dumps({"versions": versions, "statistics": of_tuned_lens}, separators=(",", ":")) + "\n")
    print("\n".join(table(found)), "\n", versions)  # noqa: T201  a script


if __name__ == "__main__":
    main()
