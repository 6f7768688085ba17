"""How far MLX encodes ahead of the GPU, and the memory that this keeps.

MLX frees an array when the command buffer that uses it last has run. It encodes ahead of the GPU until MAX_ACTIVE_TASKS command buffers wait. A
command buffer ends after 50 operations, or once the arrays of its operations, each counted once, have more than 50 times 2^20 elements: MLX adds up
array::data_size(), which counts elements, and compares with a number of megabytes (CommandEncoder in mlx/backend/metal/device.cpp). On small GPUs
both limits are lower, so the numbers here are upper bounds there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ELEMENTS = 51 * 2**20  # of the arrays of a command buffer, from which on it ends: MLX compares whole multiples of 2^20
OPERATIONS = 51  # of a command buffer, with which it ends
COMMAND_BUFFERS = 11  # those that wait for the GPU, and the one that is being encoded


@dataclass(frozen=True)
class Array:
    """An array that operations use.

    Attributes:
        name: tells arrays apart.
        elements: number of elements.
        size: bytes that it takes while it exists; 0 if it exists in any case.
    """

    name: tuple[str, int]
    elements: int
    size: int


def most_bytes(operations: Iterable[tuple[Array, ...]]) -> int:
    """Return the most bytes of arrays that exist at once if MLX encodes these operations far ahead of the GPU.

    Args:
        operations: for each operation, in order, the arrays that it reads and writes. An array must not be needed before its first operation, nor
            after its last.
    """
    command_buffers: list[dict[tuple[str, int], Array]] = [{}]
    count = elements = 0
    for arrays in operations:
        current = command_buffers[-1]
        for array in arrays:
            if array.name not in current:
                current[array.name] = array
                elements += array.elements
        count += 1
        if elements >= ELEMENTS or count >= OPERATIONS:
            command_buffers.append({})
            count = elements = 0
    most = 0
    for first in range(max(1, len(command_buffers) - COMMAND_BUFFERS + 1)):
        used = {name: array.size for buffer in command_buffers[first : first + COMMAND_BUFFERS] for name, array in buffer.items()}
        most = max(most, sum(used.values()))
    return most
