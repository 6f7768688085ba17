"""Several processes: each trains on its share of every step's sequences, or trains its share of the layers; rank 0 writes.

The group is MLX's (`mlx.launch` starts the processes; ring, MPI, JACCL and NCCL are its backends). Every message is a sum over the group or a
gathering of it, of at most BUCKET_BYTES, and all processes must send the same messages in the same order: whatever decides about a message
(settings, a wish to stop, a checkpoint that was found) is agreed on before.

What a message is made of is computed before it is sent, so that no queue of a GPU waits for the network (Metal ends a command that waits for
seconds), and the backend chooses the stream: the CPU's for ring, MPI and JACCL, the GPU's for NCCL.

A process that dies takes the others along: ring notices at the next message (GroupLostError), and mlx.launch ends what is left. One that hangs, or a
machine that loses its power or network, is noticed by nobody but the time limit of each message, which ends the process: MLX's waiting can't be
interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from metalens.training.optimizer import Parameters
from metalens.utils.arrays import to_float, to_list
from metalens.utils.errors import InvalidTypeError, InvalidValueError, UnavailableError

log = logging.getLogger(__name__)

Share = Literal["data", "layers"]

BUCKET_BYTES = 32 * 2**20  # of one message: large enough for the network's bandwidth, small enough not to matter
TIMEOUT = 1800.0  # seconds that a message may take: what one process may be behind another, and the time limit of PyTorch's groups
EXIT_STATUS = 75  # of a process whose message took longer: sysexits.h's EX_TEMPFAIL, "try again later"

# What MPI's launchers say about the number of processes: Open MPI; MPICH, Intel MPI; mlx.launch for NCCL.
_WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_WORLD_SIZE")

_LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # files of mlx.launch with an entry for each process, for ring and JACCL


class GroupLostError(UnavailableError):
    """Another process of the run has ended, or can't be reached."""


@dataclass
class _Incoming:
    """An array whose sum has not arrived in full."""

    shape: tuple[int, ...]
    missing: int
    parts: list[mx.array] = field(default_factory=list)

    def whole(self) -> mx.array:
        if len(self.parts) == 1:
            flat = self.parts[0]
        else:
            flat = mx.concatenate(self.parts) if self.parts else mx.zeros((0,))
            mx.eval(flat)
        return flat.reshape(self.shape)


class Group:
    """The processes of a run.

    Args:
        share: what is divided among them: the sequences of every step ('data'), or the layers, for lenses that do not fit one machine ('layers').
        group: MLX's, as `mlx.core.distributed.init()` gives it; None = this process alone.
        timeout: seconds after which a message that has not arrived ends the process with a message and status 75; None = wait forever. A process
            that is behind the others by more than this (it loads from a slower disk) needs a larger one.

    Attributes:
        share, group, timeout: as given.
        rank, size: of this process, from 0, and their number.
        messages: sent so far.
    """

    def __init__(self, share: Share = "data", group: Any = None, timeout: float | None = TIMEOUT) -> None:
        if share not in ("data", "layers"):
            raise InvalidValueError(f"share must be 'data' or 'layers', got {share!r}.")
        if timeout is not None and not timeout > 0:
            raise InvalidValueError(f"timeout must be positive, or None, got {timeout}.")
        self.share = share
        self.group = group
        self.timeout = timeout
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.messages = 0

    @classmethod
    def from_environment(cls, share: Share = "data", timeout: float | None = TIMEOUT) -> Group:
        """The processes that mlx.launch or mpirun started together with this one; a process that was started alone is a group by itself.

        Raises:
            RuntimeError: if there are others and MLX has no backend to reach them: each would train alone and write the same files.
        """
        hostfile = os.environ.get("MLX_HOSTFILE")
        if hostfile and Path(hostfile).is_file() and not Path(hostfile).read_text().strip():
            return cls(share, timeout=timeout)  # `mlx.launch -n 1` gives an empty one, on which init() fails
        started = max([int(os.environ[name]) for name in _WORLD_SIZES if os.environ.get(name, "").isdigit()] + [_listed(name) for name in _LISTS])
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise UnavailableError(
                f"MLX can't reach the other processes: {error}. Look at the hosts and their ports, and whether all processes were started."
            ) from error
        if group.size() == 1 and started > 1:
            raise UnavailableError(
                f"This is one of {started} processes, and MLX can't reach the others: it has no backend for what started them. "
                "Start them with `mlx.launch --backend ring`, or install MPI where MLX finds it (MLX_MPI_LIBNAME)."
            )
        return cls(share, group if group.size() > 1 else None, timeout)

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def data_share(self) -> tuple[int, int]:
        """(rank, world) of the sequences that this process sees."""
        return (self.rank, self.size) if self.share == "data" else (0, 1)

    @property
    def layers_apart(self) -> bool:
        """Whether this process trains some of the layers, and others the rest."""
        return self.share == "layers" and self.size > 1

    def layers_of(self, layers: Sequence[int], rank: int | None = None) -> list[int]:
        """The layers that this process (or another) trains; with more processes than layers some have none."""
        return list(layers) if self.share == "data" else list(layers)[self.rank if rank is None else rank :: self.size]

    def passes(self, layers: Sequence[int], at_once: int | None) -> list[tuple[list[int], list[int]]]:
        """(layers of this process, layers of all) for each pass over the data: as many passes in every process.

        Args:
            layers: all.
            at_once: so many in a pass, in each process; None = all.
        """
        divided = self.size if self.share == "layers" else 1
        step = divided * (at_once or max(len(layers), 1))
        together = [list(layers[i : i + step]) for i in range(0, len(layers), step)] or [[]]
        return [(self.layers_of(of_all), of_all) for of_all in together]

    # Sums

    def total(self, *values: mx.array) -> list[mx.array]:
        """Sums over the group in float32, evaluated: the arrays of all processes must have the same shapes. They travel together."""
        return list(values) if self.size == 1 else list(self._summed(value.astype(mx.float32) for value in values))

    def total_of_step(self, losses: mx.array, gradients: list[Parameters]) -> mx.array:
        """Sums of a step's losses and gradients, if the processes divide the data: the losses', and the gradients' in place of their own.

        Beside the gradients a few buckets and one parameter are in memory.

        Args:
            losses: [layers].
            gradients: of every layer, float32.
        """
        if self.size == 1 or self.share == "layers":
            return losses
        places = [(gradient, name) for gradient in gradients for name in gradient]

        def sent() -> Iterator[mx.array]:
            yield losses.astype(mx.float32)
            for gradient, name in places:
                yield gradient[name].astype(mx.float32)

        summed = self._summed(sent())
        total = next(summed)
        for (gradient, name), value in zip(places, summed, strict=True):
            gradient[name] = value
        return total

    def of_all_layers(
        self, mine: Sequence[int], layers: Sequence[int], losses: list[float], gradients: list[Parameters], names: int
    ) -> tuple[list[float], float]:
        """What the processes know of their layers, in every process: as if one had all of them, bit for bit.

        Args:
            mine: layers of this process.
            layers: of all in this pass.
            losses: of mine, each a float32.
            gradients: of mine.
            names: parameters of a layer.

        Returns:
            the losses of all layers, and the norm of their gradient.
        """
        table = np.zeros((len(layers), 1 + names), np.float32)
        for layer, loss, gradient in zip(mine, losses, gradients, strict=True):
            table[list(layers).index(layer)] = [loss, *(to_float(mx.sum(mx.square(g))) for g in gradient.values())]
        (total,) = self.total(mx.array(table))
        rows = to_list(total)
        return [row[0] for row in rows], math.sqrt(math.fsum(square for row in rows for square in row[1:]))

    def any(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return wish if self.size == 1 else to_float(self.total(mx.array([float(wish)]))[0]) > 0

    def _summed(self, values: Iterable[mx.array]) -> Iterator[mx.array]:
        """Sums over the group in their order, evaluated, each as soon as all of it has arrived. All are of one dtype, and asked for when there is
        room for them."""
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

    def _send(self, bucket: list[tuple[_Incoming, mx.array]]) -> None:
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
        """Until it has arrived."""
        self.messages += 1
        with self._limited():
            try:
                mx.eval(message)
            except RuntimeError as error:
                raise GroupLostError(
                    f"Process {self.rank} of {self.size} can't reach the others ({error}): one of them has ended, and says why where it ran. "
                    "Start all of them again with resume, to go on from the newest checkpoint."
                ) from error

    @contextmanager
    def _limited(self) -> Iterator[None]:
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
        log.critical(
            "Process %d of %d has waited for the others for %g s: one hangs, or its machine or network is gone. "
            "This process ends. Start all of them again with resume, to go on from the newest checkpoint; "
            "if a process may need longer for a step or to load its data, give Group a larger timeout.",
            self.rank,
            self.size,
            self.timeout,
        )
        os._exit(EXIT_STATUS)

    # Agreement

    def gathered(self, what: Any) -> list[Any]:
        """Everybody's JSON, by rank, in every process."""
        if self.size == 1:
            return [what]
        mine = np.frombuffer(json.dumps(what, default=_plain).encode(), np.uint8)
        sizes = self._gather(mx.array([mine.size], mx.int32))
        sent = np.zeros(max(sizes), np.uint8)
        sent[: mine.size] = mine
        everything = np.array(self._gather(mx.array(sent)), np.uint8).reshape(self.size, -1)
        return [json.loads(row[:size].tobytes()) for row, size in zip(everything, sizes, strict=True)]

    def _gather(self, values: mx.array) -> list[int]:
        mx.eval(values)
        found = mx.distributed.all_gather(values, group=self.group)
        self._wait(found)
        return to_list(found)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all processes were started alike.

        Args:
            facts: JSON by name.

        Raises:
            ValueError: in every process, naming what differs and where.
        """
        everybody = self.gathered(dict(facts))
        names = list(dict.fromkeys(name for theirs in everybody for name in theirs))
        differ = []
        for name in names:
            values = [theirs.get(name) for theirs in everybody]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                differ.append(f"{name} is {values[0]!r} in process 0 and {values[other]!r} in process {other}")
        if differ:
            raise InvalidValueError(f"The processes of this run were not started alike: {'; '.join(differ)}. Start all of them with the same.")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all: none waits for a message that another will not send.

        Raises:
            ValueError: what another process raised; this one's own error passes.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            for rank, message in enumerate(self.gathered(None if error is None else f"{type(error).__name__}: {error}")):
                if error is None and message is not None:
                    raise InvalidValueError(f"Process {rank} of {self.size} failed: {message}")
        if error is not None:
            raise error

    # Arrays of one process for all

    def shared(self, arrays: Mapping[str, mx.array] | None, owner: int = 0) -> dict[str, mx.array]:
        """One process's arrays in every process, bit for bit and in their dtypes.

        Args:
            arrays: by name; of others than the owner they do not matter.
            owner: whose.
        """
        arrays = (arrays or {}) if self.rank == owner else {}
        if self.size == 1:
            return dict(arrays)
        kinds = self.gathered([[name, str(a.dtype).removeprefix("mlx.core."), list(a.shape)] for name, a in arrays.items()])[owner]
        mine = list(arrays.values())

        def sent() -> Iterator[mx.array]:
            for i, (_, dtype, shape) in enumerate(kinds):
                of_zeros = mx.zeros((math.prod(shape) * getattr(mx, dtype).size,), mx.uint8)
                yield mine[i].reshape(-1).view(mx.uint8) if self.rank == owner else of_zeros

        found = {}
        for (name, dtype, shape), data in zip(kinds, self._summed(sent()), strict=True):
            found[name] = data.view(getattr(mx, dtype)).reshape(shape)
            mx.eval(found[name])
        return found


def _listed(variable: str) -> int:
    """How many processes the file has that an environment variable names; 1 if there is none."""
    try:
        return len(json.loads(Path(os.environ[variable]).read_text()))
    except (KeyError, OSError, ValueError, TypeError):
        return 1


def _plain(value: Any) -> Any:
    """NumPy's numbers, which settings may hold, as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    raise InvalidTypeError(f"{value!r} can't be written as JSON.")
