"""One job at a time, in a thread of its own that holds the model.

MLX's arrays belong to the thread that made them, and one model can do one thing at a time. So one thread loads the model and runs every job; the
event loop never waits for it. The thread is a daemon: the end of the program waits for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from metalens.utils.errors import MetalensError

log = logging.getLogger(__name__)

Line = dict[str, Any]
M = TypeVar("M")
# A job: a function of the model that yields its results, line by line. It may be stopped at every yield.
Work = Callable[[M], Iterator[Line]]
BUSY = "Another job is running: this server does one at a time. Wait until it is done, or cancel it, and try again."
ENDING = "The last job is stopping: its step takes long. Try again in a moment."
AHEAD = 4  # lines that may wait for a browser that reads slowly: a long text's results are tens of megabytes
PATIENCE = 60.0  # seconds to wait for it before the job is cancelled
STOPPING = 20.0  # seconds to wait for a cancelled job before the next one is refused


class BusyError(MetalensError, RuntimeError):
    """Another job is running."""


class Job(Generic[M]):
    """A job and its results, which another thread makes.

    Args:
        work: the job.
        loop: the event loop that reads the results.
    """

    def __init__(self, work: Work[M], loop: asyncio.AbstractEventLoop) -> None:
        self.work, self.loop = work, loop
        self.cancelled = threading.Event()
        self.ended = asyncio.Event()
        self._lines: asyncio.Queue[Line | None] = asyncio.Queue()
        self._room = threading.Semaphore(AHEAD)

    async def lines(self) -> AsyncIterator[Line]:
        """Yield the results. Whoever stops reading, for example because the browser has gone, cancels the job."""
        try:
            while (line := await self._lines.get()) is not None:
                yield line
                self._room.release()
        finally:
            self.cancelled.set()

    def run(self, model: M) -> None:
        """Run the job in this thread. An error of the library becomes a line; any other one is logged with its traceback, and becomes one too."""
        last: Line = {"type": "done"}
        try:
            for line in self.work(model):
                if not self._wait_for_room():
                    break
                self._send(line)
        except (MetalensError, OSError) as error:
            last = {"type": "error", "message": str(error)}
        except Exception as error:  # the thread has to survive: the next job may do better
            log.exception("A job of the viewer failed.")
            last = {"type": "error", "message": f"The job failed: {type(error).__name__}: {error}. The terminal shows more; this may be a bug."}
        self._send(last, None)

    def _wait_for_room(self) -> bool:
        """Wait until the reader has taken what came before. Return False if it has gone, or does not go on."""
        end = time.monotonic() + PATIENCE
        while not self.cancelled.is_set() and time.monotonic() < end:
            if self._room.acquire(timeout=0.1):
                return not self.cancelled.is_set()
        self.cancelled.set()
        return False

    def _send(self, *lines: Line | None) -> None:
        def put() -> None:
            for line in lines:
                self._lines.put_nowait(line)
            if None in lines:
                self.ended.set()

        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop has ended: nobody reads any more
            self.cancelled.set()


class ModelThread(Generic[M]):
    """A thread that holds a model.

    Args:
        load: function that loads the model, in the thread.
    """

    def __init__(self, load: Callable[[], M]) -> None:
        self.loaded: Future[M] = Future()
        self._jobs: queue.SimpleQueue[Job[M] | None] = queue.SimpleQueue()
        self._current: Job[M] | None = None
        self._thread = threading.Thread(target=self._run, args=(load,), name="metalens model", daemon=True)
        self._thread.start()

    def _run(self, load: Callable[[], M]) -> None:
        try:
            model = load()
        except BaseException as error:
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(model)
        while (job := self._jobs.get()) is not None:
            job.run(model)

    async def start(self, work: Work[M]) -> Job[M]:
        """Start a job.

        Raises:
            BusyError: if another one is running, and has not been cancelled.
        """
        current = self._current
        if current is not None and current.cancelled.is_set() and not current.ended.is_set():
            try:
                await asyncio.wait_for(current.ended.wait(), STOPPING)
            except TimeoutError:
                raise BusyError(ENDING) from None
        if self._current is not None and not self._current.ended.is_set():
            raise BusyError(BUSY)
        job = Job(work, asyncio.get_running_loop())
        self._current = job
        self._jobs.put(job)
        return job

    def cancel(self) -> None:
        """Stop the job that is running at its next line."""
        if self._current is not None:
            self._current.cancelled.set()

    def close(self, seconds: float) -> bool:
        """Stop the job, end the thread, and return whether it ended within some seconds."""
        self.cancel()
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()
