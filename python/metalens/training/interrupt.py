"""Ctrl-C ends a run within about a second, with a checkpoint: pass the function that `interruptible` yields as `stop` to `train`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

INTERRUPTED = 130  # exit status of an interrupted process: 128 + SIGINT, as in shells

MESSAGE = b"\nStopping. Press Ctrl-C again to end at once.\n"


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed in the `with` block.

    The first Ctrl-C is noted, with a line on stderr. A second one ends the process at once with status 130: no file is ever half written. Outside
    the main thread, which alone may handle signals, the function always returns False.

    A thread listens, because Python's own handlers wait until an evaluation of MLX has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    listening, signalled = os.pipe()
    os.set_blocking(signalled, False)

    def listen() -> None:
        while received := os.read(listening, 1):
            if received[0] != signal.SIGINT:
                continue
            if asked.is_set():
                os._exit(INTERRUPTED)
            asked.set()
            with contextlib.suppress(OSError):
                os.write(2, MESSAGE)
        os.close(listening)

    threading.Thread(target=listen, name="metalens-interrupts", daemon=True).start()
    before = signal.signal(signal.SIGINT, lambda *_: None), signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    try:
        yield asked.is_set
    finally:
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGINT, before[0])
        os.close(signalled)
