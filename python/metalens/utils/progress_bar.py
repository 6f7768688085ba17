"""The progress bar: on stderr, in tokens per second, with the time left; quiet in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from metalens.utils.streams import Unbreakable


def token_bar(total: int, title: str, show: bool) -> tqdm:
    """Return a bar over `total` tokens. Where stderr is no terminal it reports twice a minute, not ten times a second."""
    stderr: Any = Unbreakable(sys.stderr)
    interval = 0.2 if stderr.isatty() else 30.0
    return tqdm(total=total, unit="tok", unit_scale=True, desc=title, disable=not show, mininterval=interval, maxinterval=2 * interval, file=stderr)
