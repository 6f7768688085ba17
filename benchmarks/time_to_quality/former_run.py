"""Train with a former version of metalens, in a Python in which it is installed: `PYTHON -I former_run.py REQUEST` prints what the run took.

The script imports nothing of today's metalens and of the benchmarks, and calls only what version 0.1.0 had. REQUEST is a JSON object with the model's
folder, the file of the text, the tokens, the tokens of a sequence, the layers (null = all), whether to stop after the closed form, and the path of
the lens to write.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
from pathlib import Path

import metalens

# The demo of that version: 240 steps of 128 tokens, after a warm start with 12,288 of the 43,008 tokens. A smaller budget has the same share.
WARM_START, WARM_SHARE = 12_288, 2 / 7


def status(field: str) -> float:
    """Return VmRSS or VmHWM (its peak) of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024.0 * int(found[1]) if found else 0.0


def main() -> None:
    """Train, save the lens, and print {"core_seconds", "extra_bytes"}: of the training, with the model loaded and the lens not yet saved."""
    request = json.loads(sys.argv[1])
    length, layers = request["length"], request["layers"]
    warm = request["tokens"] if request["closed_form"] else int(min(WARM_START, WARM_SHARE * request["tokens"]))
    warm = warm // length * length
    text = Path(request["text"]).read_text(encoding="utf-8")
    model = metalens.load(request["model"])
    gc.collect()
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        ctypes.CDLL(None).malloc_trim(0)
        resets.write_text("5")  # resets the peak
    before, start = status("VmRSS") if resets.exists() else 0.0, time.process_time()
    lens = metalens.train(
        model,
        [text],
        recipe="fast",
        max_seq_len=length,
        tokens_per_step=length,
        warm_start_tokens=warm,
        num_steps=(request["tokens"] - warm) // length,
        seed=0,
        layers=None if layers is None else tuple(layers),
    )
    seconds = time.process_time() - start
    extra = max(0.0, status("VmHWM") - before) if resets.exists() else 0.0
    lens.save(request["lens"])
    print(json.dumps({"core_seconds": [seconds], "extra_bytes": [extra]}), flush=True)
    os._exit(0)  # the result is out: nothing waits for that version's threads


if __name__ == "__main__":
    main()
