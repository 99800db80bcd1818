"""From calls to an iterator: work that reports through a callback, read by a for loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class _Stopped(BaseException):
    """Raised inside the work when nobody reads its items any more."""


def iterate(work: Callable[[Callable[[Item], None]], object]) -> Iterator[Item]:
    """Yields what ``work`` hands to its argument, in order, while it runs in a thread.

    The work waits for the reader: it is never more than two items ahead. An exception inside it
    reaches the reader. When the reader stops early, the work ends at its next item.
    """
    items: queue.Queue[Item | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def emit(item: Item) -> None:
        if stopped.is_set():
            raise _Stopped
        items.put(item)

    def run() -> None:
        end: BaseException | None = None
        try:
            work(emit)
        except BaseException as problem:  # handed to the reader, who raises it
            end = problem
        items.put(end)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while thread.is_alive():  # the work may be waiting to hand over one more item
            try:
                items.get(timeout=0.05)
            except queue.Empty:
                continue
        thread.join()
