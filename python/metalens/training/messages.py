"""Messages between the processes of a run: sums and gatherings over MLX's group, in buckets, each with a time limit.

All processes must send the same messages in the same order. A message is computed before it is sent, so that no queue of a GPU waits for the network
(Metal ends a command that waits for seconds). The backend chooses MLX's stream: the CPU's for ring, MPI and JACCL, the GPU's for NCCL.

The death of a process ends the others too: ring notices it at the next message (GroupLostError), and mlx.launch ends the rest. A process that hangs,
or a machine that loses its power or network, is noticed by the time limit of a message alone, which ends the process: a wait of MLX can't be
interrupted.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metalens.utils.errors import InvalidValueError, UnavailableError

log = logging.getLogger(__name__)

BUCKET_BYTES = 32 * 2**20  # of one message: large enough for the bandwidth of the network, small beside a gradient
TIMEOUT = 1800.0  # seconds that a message may take, as in PyTorch's groups: the time by which one process may be behind another
BACKENDS = re.compile(r"\[(ring|mpi|jaccl|nccl)\]", re.IGNORECASE)  # how the errors of MLX's backends for messages begin
EXIT_STATUS = 75  # of a process whose message took longer: sysexits.h's EX_TEMPFAIL, "try again later"


class GroupLostError(UnavailableError):
    """Another process of the run has ended, or can't be reached."""


@dataclass
class _Incoming:
    """An array whose sum has not arrived in full.

    Attributes:
        shape: shape of the array.
        missing: number of elements that have not arrived.
        parts: the parts that have arrived, in order.
    """

    shape: tuple[int, ...]
    missing: int
    parts: list[mx.array] = field(default_factory=list)

    def whole(self) -> mx.array:
        """Return the array, once nothing is missing."""
        if len(self.parts) == 1:
            flat = self.parts[0]
        else:
            flat = mx.concatenate(self.parts) if self.parts else mx.zeros((0,))
            mx.eval(flat)
        return flat.reshape(self.shape)


class Messenger:
    """Sends messages to the other processes of a group and waits for theirs.

    Args:
        group: MLX's group. None = this process alone, which sends nothing.
        timeout: seconds after which a message that has not arrived ends the process. None = wait forever.

    Attributes:
        group, timeout: as given.
        rank, size: number of this process, from 0, and number of processes.
        sent: number of messages so far.
    """

    def __init__(self, group: Any, timeout: float | None) -> None:
        if timeout is not None and not timeout > 0:
            raise InvalidValueError(f"timeout must be positive, or None, got {timeout}.")
        self.group, self.timeout = group, timeout
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.sent = 0

    def sums(self, values: Iterable[mx.array]) -> Iterator[mx.array]:
        """Yield the sums of arrays over the group, evaluated, each as soon as all of it has arrived.

        Args:
            values: arrays of one dtype, of the same shapes in all processes. Each is asked for when there is room for it.
        """
        incoming: deque[_Incoming] = deque()
        bucket: list[tuple[_Incoming, mx.array]] = []
        room = 0
        for value in values:
            flat, start = value.reshape(-1), 0
            incoming.append(_Incoming(value.shape, flat.size))
            while start < flat.size:
                room = room or max(BUCKET_BYTES // flat.itemsize, 1)
                size = min(room, flat.size - start)
                bucket.append((incoming[-1], flat[start : start + size]))
                start += size
                room -= size
                if not room:
                    self._send(bucket)
            del value, flat
            while incoming and not incoming[0].missing:
                yield incoming.popleft().whole()
        if bucket:
            self._send(bucket)
        while incoming:
            yield incoming.popleft().whole()

    def gather(self, values: mx.array) -> mx.array:
        """Return the rows of all processes, by rank, evaluated."""
        mx.eval(values)
        found = mx.distributed.all_gather(values, group=self.group)
        self._wait(found)
        return found

    def _send(self, bucket: list[tuple[_Incoming, mx.array]]) -> None:
        """Send a bucket, wait for its sum, and hand the parts to their arrays."""
        message = mx.concatenate([piece for _, piece in bucket])
        mx.eval(message)
        sizes = [(target, piece.size) for target, piece in bucket]
        bucket.clear()
        summed = mx.distributed.all_sum(message, group=self.group)
        self._wait(summed)
        start = 0
        for target, size in sizes:
            part = summed[start : start + size]
            target.parts.append(part if size == summed.size else part * 1)  # a copy: a view would keep the whole bucket
            target.missing -= size
            start += size
        mx.eval([target.parts for target, _ in sizes])

    def _wait(self, message: mx.array) -> None:
        """Wait until a message has arrived."""
        self.sent += 1
        with self._time_limit():
            try:
                mx.eval(message)
            except RuntimeError as error:
                raise self._lost(error) from error

    def wait(self, arrays: Sequence[mx.array]) -> None:
        """Compute arrays of a model that is divided among the processes, whose forward pass sends messages."""
        with self._time_limit(), self.reporting_loss():
            mx.eval(arrays)

    @contextmanager
    def reporting_loss(self) -> Iterator[None]:
        """Turn an error of MLX's backends for messages into a GroupLostError. Other errors, such as a lack of memory, pass unchanged."""
        try:
            yield
        except RuntimeError as error:
            if not BACKENDS.match(str(error)):
                raise
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> GroupLostError:
        return GroupLostError(
            f"Process {self.rank} of {self.size} can't reach the others ({error}): one of them has ended, and says why where it ran. "
            "Start all of them again with resume, to go on from the newest checkpoint."
        )

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        timer = None if self.timeout is None else threading.Timer(self.timeout, self._give_up)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _give_up(self) -> None:
        """End the process: its wait can't be interrupted."""
        log.critical(
            "Process %d of %d has waited for the others for %g s: one hangs, or its machine or network is gone. "
            "This process ends. Start all of them again with resume, to go on from the newest checkpoint; "
            "if a process may need longer for a step or to load its data, give Group a larger timeout.",
            self.rank,
            self.size,
            self.timeout,
        )
        os._exit(EXIT_STATUS)
