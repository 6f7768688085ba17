"""Check that a demo's evaluation.json shows a good lens; exit with 1 if it does not.

Every number must be finite. The tuned lens's KL must be below the logit lens's at every layer except the last, where both are 0, and its mean over
layers at most half.
"""

import argparse
import json
import math
import sys
from pathlib import Path

LARGEST_RATIO = 0.5
LARGEST_LAST = 1e-3  # nats per token: of a model with 16-bit numbers it is 0 up to rounding


def main() -> None:
    """Compare the two lenses' KL in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="evaluation.json, as `metalens demo` writes it")
    layers = json.loads(parser.parse_args().evaluation.read_text())["layers"]
    logit = [layer["logit"]["kl"] for layer in layers]
    tuned = [layer["tuned"]["kl"] for layer in layers]
    worse = [i for i in range(len(layers) - 1) if not tuned[i] < logit[i]]
    ratio = sum(tuned) / sum(logit)
    damaged = [layer["layer"] for layer in layers if not all(map(math.isfinite, [*layer["logit"].values(), *layer["tuned"].values()]))]
    last = max(abs(logit[-1]), abs(tuned[-1]))
    sys.stderr.write(
        f"mean KL, tuned lens / logit lens: {ratio:.3f} (at most {LARGEST_RATIO}); layers where the tuned lens is not better: {worse}; "
        f"layers with numbers that are not finite: {damaged}; KL of the last layer: {last:.1e} (at most {LARGEST_LAST})\n"
    )
    sys.exit(bool(worse or damaged) or not ratio <= LARGEST_RATIO or not last <= LARGEST_LAST)


if __name__ == "__main__":
    main()
