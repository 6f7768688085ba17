"""Several processes that train one lens: each takes a part of the sequences of every step, or a part of the layers; rank 0 writes.

The group is MLX's (`mlx.launch` starts the processes; ring, MPI, JACCL and NCCL are its backends). Every message is a sum or a gathering over the
group, and all processes must send the same messages in the same order: they agree first on everything that decides about a message, such as the
settings, a wish to stop, or the checkpoint to go on from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from metalens.models.capture import ResidualCapture
from metalens.models.layers import Layer
from metalens.training.messages import TIMEOUT, Messenger
from metalens.training.optimizer import Parameters, sums_of_squares
from metalens.utils.arrays import to_float, to_list
from metalens.utils.errors import InvalidTypeError, InvalidValueError, UnavailableError
from metalens.utils.renamed import renamed_arguments, renamed_attribute

Parallel = Literal["data", "layers"]

# Variables with the number of processes: of Open MPI; of MPICH and Intel MPI; of mlx.launch for NCCL.
_WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_WORLD_SIZE")

_LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # files of mlx.launch with an entry for each process, for ring and JACCL

L = TypeVar("L", int, Layer)


class LayerPass(NamedTuple):
    """The layers that are trained in one pass over the text.

    Attributes:
        layers: layers of this process.
        of_all: layers of all processes together.
    """

    layers: list[Layer]
    of_all: list[Layer]


class Group:
    """The processes of a run.

    Args:
        parallel: what the processes divide among them: the sequences of every step ('data'), or the layers ('layers'), for lenses that do not fit one
            machine.
        group: MLX's group, from `mlx.core.distributed.init()`. None = this process alone.
        timeout: seconds after which a message that has not arrived ends the process with a log message and status 75. None = wait forever. A
            process that is behind the others by more than this (it loads from a slower disk) needs a larger one.

    Attributes:
        parallel, group, timeout: as given.
        rank, size: number of this process, from 0, and number of processes.

    Raises:
        InvalidValueError: for an argument out of range.
    """

    share = renamed_attribute("share", "parallel")

    @renamed_arguments(share="parallel")
    def __init__(self, parallel: Parallel = "data", group: Any = None, timeout: float | None = TIMEOUT) -> None:
        if parallel not in ("data", "layers"):
            raise InvalidValueError(f"parallel must be 'data' or 'layers', got {parallel!r}.")
        self._messenger = Messenger(group, timeout)
        self.parallel = parallel
        self.group = group
        self.timeout = timeout
        self.rank = self._messenger.rank
        self.size = self._messenger.size

    @classmethod
    @renamed_arguments(share="parallel")
    def from_environment(cls, parallel: Parallel = "data", timeout: float | None = TIMEOUT) -> Group:
        """Return the group of the processes that mlx.launch or mpirun started. A process that was started alone is a group by itself.

        Raises:
            UnavailableError: if there are other processes and MLX has no backend to reach them: each would train alone and write the same files.
        """
        hostfile = os.environ.get("MLX_HOSTFILE")
        if hostfile and Path(hostfile).is_file() and not Path(hostfile).read_text().strip():
            return cls(parallel, timeout=timeout)  # `mlx.launch -n 1` gives an empty file, on which init() fails
        started = max([int(os.environ[name]) for name in _WORLD_SIZES if os.environ.get(name, "").isdigit()] + [_entries(name) for name in _LISTS])
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise UnavailableError(
                f"MLX can't reach the other processes: {error}. Check the hosts and their ports, and whether all processes were started."
            ) from error
        if group.size() == 1 and started > 1:
            raise UnavailableError(
                f"This is one of {started} processes, and MLX can't reach the others: it has no backend for their launcher. "
                "Start them with `mlx.launch --backend ring`, or install MPI where MLX finds it (MLX_MPI_LIBNAME)."
            )
        return cls(parallel, group if group.size() > 1 else None, timeout)

    @property
    def messages(self) -> int:
        """Return the number of messages that were sent so far."""
        return self._messenger.sent

    @property
    def writes(self) -> bool:
        """Tell whether this process writes files and shows progress."""
        return self.rank == 0

    # ------------------------------------------------------------------ what each process does

    @property
    def data_rank(self) -> tuple[int, int]:
        """Return (rank, world) for `Sampler.take_step`: which sequences of a step this process sees."""
        return (self.rank, self.size) if self.parallel == "data" else (0, 1)

    @property
    def divides_layers(self) -> bool:
        """Tell whether the processes train different layers."""
        return self.parallel == "layers" and self.size > 1

    def layers_of(self, layers: Sequence[L], rank: int | None = None) -> list[L]:
        """Return the layers that a process trains (None = this one). With more processes than layers some have none."""
        return list(layers) if self.parallel == "data" else list(layers)[self.rank if rank is None else rank :: self.size]

    def passes(self, layers: Sequence[Layer], at_once: int | None) -> list[LayerPass]:
        """Return the passes over the text that train all layers. Every process makes the same number of passes.

        Args:
            layers: layers to train.
            at_once: number of layers that one process trains in a pass. None = all.
        """
        divided = self.size if self.parallel == "layers" else 1
        step = divided * (at_once or max(len(layers), 1))
        together = [list(layers[i : i + step]) for i in range(0, len(layers), step)] or [[]]
        return [LayerPass(self.layers_of(of_all), of_all) for of_all in together]

    # ------------------------------------------------------------------ sums

    def all_sum(self, *values: mx.array) -> list[mx.array]:
        """Return sums over the group in float32, evaluated. The arrays of all processes must have the same shapes. They travel together."""
        return list(values) if self.size == 1 else list(self._messenger.sums(value.astype(mx.float32) for value in values))

    def sum_over_data(self, *values: mx.array) -> list[mx.array]:
        """Return sums over the processes that divide the text. If they divide the layers, every process sees all text: return the values."""
        return self.all_sum(*values) if self.parallel == "data" else list(values)

    def sum_step(self, losses: mx.array, gradients: list[Parameters]) -> mx.array:
        """Return the losses of a step, and replace its gradients in place, with sums over the processes that divide the text.

        Beside the gradients a few buckets and one parameter are in memory.

        Args:
            losses: losses of the layers, then the number of tokens, [layers + 1].
            gradients: gradient of every layer, float32.
        """
        if self.size == 1 or self.parallel == "layers":
            return losses
        entries = [(gradient, name) for gradient in gradients for name in gradient]

        def outgoing() -> Iterator[mx.array]:
            yield losses.astype(mx.float32)
            for gradient, name in entries:
                yield gradient[name].astype(mx.float32)

        sums = self._messenger.sums(outgoing())
        total = next(sums)
        for (gradient, name), value in zip(entries, sums, strict=True):
            gradient[name] = value
        return total

    def gather_layers(
        self, mine: Sequence[Layer], layers: Sequence[Layer], losses: list[float], gradients: list[Parameters], names: int, tokens: int
    ) -> tuple[list[float], float, int]:
        """Return the losses of all layers, the norm of their gradient and the tokens, in every process, as if one had all layers, bit for bit.

        Args:
            mine: layers of this process.
            layers: layers of all processes in this pass.
            losses: loss of each of this process's layers, in float32 precision.
            gradients: gradient of each of this process's layers.
            names: number of parameters of a layer.
            tokens: number of tokens that the losses are sums over, below 2^24. A process without layers has counted none.
        """
        table = np.zeros((len(layers), 2 + names), np.float32)
        for layer, loss, gradient in zip(mine, losses, gradients, strict=True):
            table[list(layers).index(layer)] = [loss, tokens, *sums_of_squares(gradient)]
        (total,) = self.all_sum(mx.array(table))
        rows = to_list(total)
        return [row[0] for row in rows], math.sqrt(math.fsum(square for row in rows for square in row[2:])), round(rows[0][1])

    def all_gather(self, array: mx.array) -> mx.array:
        """Return the rows of all processes, by rank, evaluated. The arrays must have the same shape and dtype."""
        return array if self.size == 1 else self._messenger.gather(array)

    def wait(self, arrays: Sequence[mx.array]) -> None:
        """Compute arrays that need messages of the other processes, such as the hidden states of a model that is divided among them.

        Raises:
            GroupLostError: if another process has ended.
        """
        self._messenger.wait(arrays)

    def reporting_loss(self) -> AbstractContextManager[None]:
        """Return a context manager that turns an error of MLX's messages, also those of other packages, into a GroupLostError."""
        return self._messenger.reporting_loss()

    # ------------------------------------------------------------------ agreement

    def any(self, wish: bool) -> bool:
        """Tell whether any process has this wish."""
        return wish if self.size == 1 else to_float(self.all_sum(mx.array([float(wish)]))[0]) > 0

    def gather_json(self, value: Any) -> list[Any]:
        """Return a JSON value of every process, by rank, in every process."""
        if self.size == 1:
            return [value]
        mine = np.frombuffer(json.dumps(value, default=_plain_number).encode(), np.uint8)
        sizes = to_list(self._messenger.gather(mx.array([mine.size], mx.int32)))
        padded = np.zeros(max(sizes), np.uint8)
        padded[: mine.size] = mine
        everything = np.array(self._messenger.gather(mx.array(padded)), np.uint8).reshape(self.size, -1)
        return [json.loads(row[:size].tobytes()) for row, size in zip(everything, sizes, strict=True)]

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes were started with the same settings, model, text and versions.

        Args:
            facts: JSON values by name.

        Raises:
            InvalidValueError: in every process; names the facts that differ, and in which process.
        """
        everybody = self.gather_json(dict(facts))
        names = list(dict.fromkeys(name for theirs in everybody for name in theirs))
        differ = []
        for name in names:
            values = [theirs.get(name) for theirs in everybody]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                differ.append(f"{name} is {values[0]!r} in process 0 and {values[other]!r} in process {other}")
        if differ:
            raise InvalidValueError(
                f"The processes of this run were started with different settings: {'; '.join(differ)}. Use identical settings for all."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of one process in the `with` block end all: none waits for a message that another will not send.

        Raises:
            InvalidValueError: with the error of another process. This process's own error passes unchanged.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            for rank, message in enumerate(self.gather_json(None if error is None else f"{type(error).__name__}: {error}")):
                if error is None and message is not None:
                    raise InvalidValueError(f"Process {rank} of {self.size} failed: {message}")
        if error is not None:
            raise error

    def broadcast(self, arrays: Mapping[str, mx.array] | None, root: int = 0) -> dict[str, mx.array]:
        """Return the arrays of one process in every process, bit for bit and in their dtypes.

        Args:
            arrays: arrays by name. Those of other processes than the root are ignored.
            root: rank of the process that has the arrays.
        """
        arrays = (arrays or {}) if self.rank == root else {}
        if self.size == 1:
            return dict(arrays)
        kinds = self.gather_json([[name, str(a.dtype).removeprefix("mlx.core."), list(a.shape)] for name, a in arrays.items()])[root]
        mine = list(arrays.values())

        def outgoing() -> Iterator[mx.array]:
            for i, (_, dtype, shape) in enumerate(kinds):
                zeros = mx.zeros((math.prod(shape) * getattr(mx, dtype).size,), mx.uint8)
                yield mine[i].reshape(-1).view(mx.uint8) if self.rank == root else zeros

        found = {}
        for (name, dtype, shape), data in zip(kinds, self._messenger.sums(outgoing()), strict=True):
            found[name] = data.view(getattr(mx, dtype)).reshape(shape)
            mx.eval(found[name])
        return found


def group_of(source: ResidualCapture | None, group: Group | None) -> Group:
    """Return the processes of a run: the given ones, else those that hold the model, else this process alone.

    Args:
        source: captures the model's hidden states. None = the model is not loaded yet.
        group: the processes that the caller gives.

    Raises:
        InvalidValueError: if the model is divided, and the processes are others than those that hold it or divide the text.
    """
    holders = None if source is None or source.sharding is None else source.sharding.processes
    if holders is None:
        return group or Group()
    found = group or holders
    if not isinstance(found, Group) or (found.rank, found.size) != (holders.rank, holders.size):
        raise InvalidValueError(f"The model is divided among {holders.size} processes. Give train the same group, or none.")
    if found.parallel != "layers":
        raise InvalidValueError(
            "Processes that divide the model all read the same text: give Group('layers', ...), or Group.from_environment('layers')."
        )
    return found


def require_divisible(model: Any, group: Group | None) -> None:
    """Check the arguments of a run that divides its model (InvalidValueError)."""
    if not isinstance(model, (str, Path)):
        raise InvalidValueError("shard_model=True needs the name of a model: mlx-lm divides it while it is loaded.")
    if group is None or group.parallel != "layers":
        raise InvalidValueError("shard_model=True needs a group whose processes divide the layers: group=Group.from_environment('layers').")


def _entries(variable: str) -> int:
    """Return the number of processes in the file that an environment variable names; 1 if there is no such file."""
    try:
        return len(json.loads(Path(os.environ[variable]).read_text()))
    except (KeyError, OSError, ValueError, TypeError):
        return 1


def _plain_number(value: Any) -> Any:
    """Return a number of NumPy, which settings may hold, as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    raise InvalidTypeError(f"{value!r} can't be written as JSON.")
