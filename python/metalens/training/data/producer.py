"""A thread that makes the next inputs while the model computes."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar, cast

from metalens.utils.errors import InvalidValueError

T = TypeVar("T")


class _Shared(Generic[T]):
    """State of the thread and the consumer. It holds no reference to the Producer, so that a forgotten Producer can be collected."""

    def __init__(self, depth: int) -> None:
        self.changed = threading.Condition()
        self.depth = depth
        self.ready: deque[T] = deque()
        self.ended = False
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Let the thread end after its current item; drop the items that are ready."""
        with self.changed:
            self.ended = True
            self.ready.clear()
            self.changed.notify_all()

    def wait_for_room(self) -> bool:
        """Wait until there is room for another item. Return False if no more items are wanted."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or len(self.ready) < self.depth)
            return not self.ended

    def put(self, item: T) -> None:
        with self.changed:
            if not self.ended:
                self.ready.append(item)
                self.changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        with self.changed:
            if not self.ended:
                self.ended, self.error = True, error
            self.changed.notify_all()


def _produce(shared: _Shared[T], source: Iterable[T] | Callable[[], T]) -> None:
    items: Iterator[T] | None = None
    error: BaseException | None = None
    try:
        items = iter(source) if isinstance(source, Iterable) else None
        following = cast("Callable[[], T]", source) if items is None else items.__next__
        while shared.wait_for_room():
            shared.put(following())
    except StopIteration:
        pass
    except BaseException as caught:  # the consumer handles it
        error = caught
    finally:
        # A generator is closed here, in the thread that ran it.
        if items is not None and hasattr(items, "close"):
            items.close()
        shared.end(error)


class Producer(Generic[T]):
    """Iterates over items that a background thread makes ahead, at most `depth` of them.

    The thread is up to `depth` items ahead of the consumer. Where a position matters (a checkpoint), items must carry it, as `Step.state` does,
    and the consumer must keep the position of the last item that it has used up.

    `next` raises an exception of the source after all items that were made before it, and every later `next` raises it again. The Producer closes
    itself at the end of a `with` block; one that is no longer referenced ends its thread too.

    Args:
        source: an iterable; or a function that returns the next item and raises StopIteration at the end. From now on only the thread uses it.
        depth: number of items to make ahead, at least 1.
    """

    def __init__(self, source: Iterable[T] | Callable[[], T], depth: int = 2) -> None:
        if depth < 1:
            raise InvalidValueError(f"depth must be at least 1, got {depth}.")
        self._shared: _Shared[T] = _Shared(depth)
        self._thread = threading.Thread(target=_produce, args=(self._shared, source), name="metalens-producer", daemon=True)
        weakref.finalize(self, self._shared.stop)
        self._thread.start()

    def __iter__(self) -> Producer[T]:
        return self

    def __next__(self) -> T:
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: shared.ready or shared.ended)
            if shared.ready:
                item = shared.ready.popleft()
                shared.changed.notify_all()
                return item
        if shared.error is not None:
            raise shared.error
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for it, at most as long as the source takes for one item. Ready items are dropped; `next` raises StopIteration."""
        self._shared.stop()
        self._shared.error = None
        self._thread.join()

    def __enter__(self) -> Producer[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
