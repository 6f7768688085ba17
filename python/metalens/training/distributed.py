"""Several machines: each trains on its share of every step's sequences, or trains its share of the layers; rank 0 writes.

The group is MLX's (`mlx.launch` starts the processes; ring, MPI, JACCL and NCCL are its backends). Sums over the group go in few large pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx

from metalens.training.optimizer import Parameters

Share = Literal["data", "layers"]

BUCKET_BYTES = 32 * 2**20  # of one message: large enough for the network's bandwidth, small enough not to matter


class Group:
    """The processes of a run.

    Args:
        share: what is divided among them: the sequences of every step ('data'), or the layers, for lenses that do not fit one machine ('layers').
        group: MLX's, as `mlx.core.distributed.init()` gives it; None = this process alone.
    """

    def __init__(self, share: Share = "data", group: Any = None) -> None:
        if share not in ("data", "layers"):
            raise ValueError(f"share must be 'data' or 'layers', got {share!r}.")
        self.share = share
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def data_share(self) -> tuple[int, int]:
        """(rank, world) of the sequences that this process sees."""
        return (self.rank, self.size) if self.share == "data" else (0, 1)

    def layers_of(self, layers: Sequence[int], rank: int | None = None) -> list[int]:
        """The layers that this process (or another) trains."""
        return list(layers) if self.share == "data" else list(layers)[self.rank if rank is None else rank :: self.size]

    def total(self, *values: mx.array) -> list[mx.array]:
        """Sums over the group, evaluated: the arrays of all processes must have the same shapes. Small ones travel together."""
        if self.size == 1:
            return list(values)
        results: list[mx.array] = []
        bucket: list[mx.array] = []

        def send() -> None:
            if not bucket:
                return
            flat = mx.concatenate([a.reshape(-1).astype(mx.float32) for a in bucket])
            summed = mx.distributed.all_sum(flat, group=self.group, stream=mx.cpu)
            mx.eval(summed)
            start = 0
            for a in bucket:
                results.append(summed[start : start + a.size].reshape(a.shape))
                start += a.size
            bucket.clear()

        for value in values:
            if bucket and sum(4 * a.size for a in bucket) + 4 * value.size > BUCKET_BYTES:
                send()
            bucket.append(value)
        send()
        mx.eval(results)
        return results

    def total_of_gradients(self, gradients: list[Parameters]) -> list[Parameters]:
        """Sums of the gradients of all layers, if the processes divide the data."""
        if self.size == 1 or self.share == "layers":
            return gradients
        names = [(i, name) for i, gradient in enumerate(gradients) for name in gradient]
        summed = self.total(*(gradients[i][name] for i, name in names))
        result: list[Parameters] = [{} for _ in gradients]
        for (i, name), value in zip(names, summed, strict=True):
            result[i][name] = value
        return result

    def gathered(self, layer: int, layers: Sequence[int], parameters: Parameters | None, shapes: dict[str, tuple[int, ...]]) -> Parameters:
        """One layer's parameters from the process that trains it, in every process: a sum with zeros from all others.

        Args:
            layer: its number.
            layers: of all processes together.
            parameters: of the layer, in the process that has it.
            shapes: by name.
        """
        if self.size == 1 or self.share == "data":
            assert parameters is not None
            return parameters
        values = self.total(*(parameters[name] if parameters is not None else mx.zeros(shape) for name, shape in shapes.items()))
        return dict(zip(shapes, values, strict=True))
