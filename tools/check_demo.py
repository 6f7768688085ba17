"""Check that a demo's evaluation.json shows a good lens; exit with 1 if it does not.

The tuned lens's KL must be below the logit lens's at every layer except the last, and its mean over layers at most half.
"""

import argparse
import json
import sys
from pathlib import Path

LARGEST_RATIO = 0.5


def main() -> None:
    """Compare the two lenses' KL in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="evaluation.json, as `metalens demo` writes it")
    layers = json.loads(parser.parse_args().evaluation.read_text())["layers"]
    logit = [layer["logit"]["kl"] for layer in layers]
    tuned = [layer["tuned"]["kl"] for layer in layers]
    worse = [i for i in range(len(layers) - 1) if not tuned[i] < logit[i]]
    ratio = sum(tuned) / sum(logit)
    sys.stderr.write(f"mean KL, tuned lens / logit lens: {ratio:.3f} (at most {LARGEST_RATIO}); layers where the tuned lens is not better: {worse}\n")
    sys.exit(bool(worse) or not ratio <= LARGEST_RATIO)


if __name__ == "__main__":
    main()
