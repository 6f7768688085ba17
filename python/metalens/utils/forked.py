"""A process that was forked after MLX had been used: MLX's threads are not in it, and its next evaluation would wait for ever."""

from __future__ import annotations

import os

from metalens.utils.errors import UnavailableError

_state = {"used": False, "forked": False}


def require_own_threads() -> None:
    """Note that this process uses MLX. Call it before an evaluation.

    Raises:
        UnavailableError: if this process was forked from one that had used MLX.
    """
    if _state["forked"]:
        raise UnavailableError(
            "This process was forked from one that had used MLX, and would wait for ever: MLX's threads are not copied. "
            "Start processes with multiprocessing.get_context('spawn'), or fork before the first use of metalens."
        )
    _state["used"] = True


def _after_fork() -> None:
    _state["forked"] = _state["forked"] or _state["used"]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
