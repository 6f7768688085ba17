"""Ctrl-C is noted, and a second one ends the process, whatever has become of stderr."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from metalens.training.interrupt import INTERRUPTED, interruptible

# Ctrl-C twice: after the first, the process has time to notice it.
TWICE = """
import os, signal, time
from metalens.training.interrupt import interruptible
with interruptible() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    while not stop():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize("stderr", ["open", "pipe without a reader", "full"])
def test_a_second_ctrl_c_ends_the_process(stderr):
    """The message could not be written: the thread that listens died, and nothing ended the run any more."""
    if stderr == "full":
        written = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, written = os.pipe()
        if stderr != "open":
            os.close(reader)
    process = subprocess.run([sys.executable, "-c", TWICE], stderr=written, timeout=50, check=False)
    os.close(written)
    assert process.returncode == INTERRUPTED
    if stderr == "open":
        assert b"Press Ctrl-C again" in os.read(reader, 1000)
        os.close(reader)


def test_the_handler_before_is_back_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stop:
        assert signal.getsignal(signal.SIGINT) is not before
        assert not stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_threads_beside_the_main_one_are_never_asked_to_stop():
    found = []

    def run():
        with interruptible() as stop:
            found.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
