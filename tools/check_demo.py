"""Exit 1 unless a demo's evaluation.json shows what the demo promises: check_demo.py FILE.

The tuned lens's KL is below the logit lens's at every layer but the last, and its mean at most half.
"""

import json
import sys
from pathlib import Path

layers = json.loads(Path(sys.argv[1]).read_text())["layers"]
logit = [layer["logit"]["kl"] for layer in layers]
tuned = [layer["tuned"]["kl"] for layer in layers]
worse = [i for i in range(len(layers) - 1) if not tuned[i] < logit[i]]
ratio = sum(tuned) / sum(logit)
sys.stderr.write(f"mean KL of the tuned lens is {ratio:.3f} of the logit lens's; layers where it is not below: {worse}\n")
sys.exit(bool(worse) or not ratio <= 0.5)
