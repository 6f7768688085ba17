"""The clock of the work at hand: is it nearly done when the run is asked to stop?

A step, a warm start or a check of the guard may take minutes. It pauses often. At a pause it is left if the run is to stop and it would take long to
finish, so a run stops within about a second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from metalens.models.capture import HiddenStates
from metalens.training.distributed import Group
from metalens.utils.progress_bar import PhaseBar

QUICK = 1.0  # seconds: work that will be done within this time is finished when the run is asked to stop, other work is dropped


class StopNow(Exception):  # noqa: N818 - no error: it leaves the sums of a step, a check or a warm start
    """The run was asked to stop, and the work at hand would take too long to finish."""


class Clock:
    """Counts the tokens of the work at hand, and moves the progress bar.

    Args:
        stop: function that tells whether the run is to stop.
        group: the processes of the run.

    Attributes:
        bar: the progress bar.
    """

    def __init__(self, stop: Callable[[], bool], group: Group) -> None:
        self.bar = PhaseBar(False)
        self._stop, self._group = stop, group
        self._work: tuple[float, int, int] | None = None  # start, tokens, and tokens that are done

    @contextlib.contextmanager
    def work(self, tokens: int) -> Iterator[None]:
        """Time the `with` block, which is the work on a number of tokens. Its pauses raise StopNow if it is to be left."""
        self._work = time.monotonic(), tokens, 0
        try:
            yield
        finally:
            self._work = None

    def count(self, tokens: int) -> None:
        """Count tokens of the work at hand as done, whose time decides whether it is finished when the run is to stop."""
        if self._work is not None:
            start, total, done = self._work
            self._work = start, total, done + tokens

    def done(self, tokens: int) -> None:
        """Count tokens of a step or warm start as done, also on the progress bar, and pause."""
        tokens *= self._group.data_rank[1]  # the other processes are about as far
        self.count(tokens)
        self.bar.advance(tokens)
        self.pause()

    def counted(self, passes: Iterable[HiddenStates]) -> Iterator[HiddenStates]:
        """Yield forward passes, and count their tokens when they are used up."""
        for batch in passes:
            yield batch
            self.done(batch.num_rows)

    def pause(self) -> None:
        """Move the progress bar, and leave the work at hand (StopNow) if the run is to stop and it would take long to finish.

        In a group the processes ask each other after steps only: they do not pause equally often.
        """
        self.bar.tick()
        if self._work is None or self._group.size > 1:
            return
        start, total, done = self._work
        elapsed, fraction = time.monotonic() - start, min(done / total, 1.0)
        left = elapsed * (1 - fraction) / fraction if fraction else elapsed
        if left > QUICK and self._stop():
            raise StopNow
