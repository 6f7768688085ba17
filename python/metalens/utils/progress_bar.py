"""Progress bars on stderr: tokens per second and the time left, phase by phase; quiet in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from metalens.utils.streams import Unbreakable

# Without a total there is no time left to show. A rate would only mislead: the first batch of a text counts as done in no time.
WITHOUT_TOTAL = "{desc}: {n_fmt} tokens [{elapsed}]"


def token_bar(total: int, title: str, show: bool, done: int = 0) -> tqdm:
    """Return a bar over `total` tokens. Where stderr is no terminal it reports twice a minute, not ten times a second.

    Args:
        total: number of tokens. 0 = unknown.
        title: name of the phase.
        show: whether to show the bar.
        done: tokens that were done before; the speed and the time left do not count them.
    """
    stderr: Any = Unbreakable(sys.stderr)
    interval = 0.2 if stderr.isatty() else 30.0
    return tqdm(
        total=total or None,
        initial=done,
        unit="tok",
        unit_scale=True,
        desc=title,
        disable=not show,
        mininterval=interval,
        maxinterval=2 * interval,
        bar_format=None if total else WITHOUT_TOTAL,
        file=stderr,
    )


class PhaseBar:
    """A progress bar for work in phases: it names the phase, and each phase has its own speed and time left.

    Args:
        show: whether to show the bar.

    Attributes:
        phase: name of the phase. "" = none has begun.
    """

    def __init__(self, show: bool) -> None:
        self.show, self.phase = show, ""
        self._bar: Any = None
        self._drawn = 0.0

    def start(self, phase: str, total: int, done: int = 0) -> None:
        """End the phase before, and begin another one of `total` tokens, of which `done` are done."""
        self.close()
        self.phase, self._bar = phase, token_bar(total, phase, self.show, done)

    def advance(self, tokens: int) -> None:
        """Count tokens of the phase, up to its total, and draw the bar if it is time."""
        if self._bar is not None:
            self._bar.update(max(0, min(tokens, (self._bar.total or sys.maxsize) - self._bar.n)))
        self.tick()

    def reach(self, tokens: int, **figures: str) -> None:
        """Set the tokens that the phase has done, and the figures to show beside them."""
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(**figures, refresh=False)
            self._bar.update(tokens - self._bar.n)

    def tick(self) -> None:
        """Let the clock of the bar go on while no token is finished."""
        now = time.monotonic()
        if self._bar is not None and not self._bar.disable and now - self._drawn >= self._bar.mininterval:
            self._drawn = now
            self._bar.refresh()

    def close(self) -> None:
        """End the phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> PhaseBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
