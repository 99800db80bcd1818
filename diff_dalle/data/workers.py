"""Worker processes that make batches: how they start, how they end, and what if one is killed.

They start from a fork server, a clean process that has imported torch and nothing else ran in.
A plain fork copies a process whose MPI, Gloo and OpenMP threads hold locks that nobody will
release; a plain spawn imports torch (seconds) for every worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from diff_dalle.data.processes import leave_with_parent

_CONTEXT = "forkserver"
_PREFETCH = 2  # items ready, for each worker
_PATIENCE = 1.0  # seconds between looks at who is still there
_LEAVING = 10.0  # seconds for workers that are busy

Item = TypeVar("Item")


def start_fork_server() -> None:
    """Does nothing if it runs; else it gets ready in the background."""
    multiprocessing.get_context(_CONTEXT).set_forkserver_preload(
        ["torch.utils.data", "diff_dalle.data.visits"]
    )
    forkserver.ensure_running()


def load(dataset: Dataset[Item], batches: Iterable[Sequence[int]], workers: int) -> Iterator[Item]:
    """What a map-style dataset makes of batches of indices, in order.

    Args:
        dataset: its ``__getitems__`` makes one item of a whole batch.
        batches: indices; those that end have a length.
        workers: processes that make the items; 0: this one.
    """
    if workers:
        start_fork_server()
    loader: DataLoader[Item] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of indices will do
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        multiprocessing_context=_CONTEXT if workers else None,
        worker_init_fn=_set_up_worker,
        # The loader draws a seed at its start: not from the generator that dropout uses.
        generator=torch.Generator(),
    )
    if not workers:
        return iter(loader)
    return WorkerBatches(loader, len(batches) if isinstance(batches, Sized) else None)


def _as_is(item: Item) -> Item:
    return item


def _set_up_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    # The loader's own watch looks at the parent process, which is the fork server here.
    leave_with_parent()


class WorkerBatches(Iterator[Item], Generic[Item]):
    """What the workers of a loader make, in order; an error where one of them is gone.

    The loader alone would wait for ever: a worker that is killed while it writes leaves half a
    batch in the pipe and the other workers' lock taken. So a thread of its own waits there, and
    ends with the iterator, as the workers do.
    """

    def __init__(self, loader: DataLoader[Item], count: int | None = None) -> None:
        """Start the workers.

        Args:
            loader: has one worker at least; made by `load`.
            count: how many items it gives; None if without end.
        """
        before = set(multiprocessing.active_children())
        with _without_main():
            made = iter(loader)
        self._workers = [p for p in multiprocessing.active_children() if p not in before]
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(1)
        self._over = threading.Event()
        hand = (made, count, self._ready, self._over)
        thread = threading.Thread(target=_hand_over, args=hand, daemon=True)
        self._leave = weakref.finalize(self, _leave, thread, self._ready, self._over)
        thread.start()

    def __next__(self) -> Item:
        """The next item; `RuntimeError` if a worker died, else the loader's own exceptions."""
        if self._over.is_set():
            raise StopIteration
        item = self._wait()
        if isinstance(item, BaseException):
            self._over.set()
            raise item
        return item

    def _wait(self) -> Item | BaseException:
        died = ""
        while True:
            try:
                return self._ready.get(timeout=_PATIENCE)
            except queue.Empty:
                if died:
                    break
                died = self._died()  # what it had finished may still be on its way
        for worker in self._workers:
            worker.terminate()
        self._leave.detach()  # the thread will not come back from the broken pipe
        return RuntimeError(
            f"a data worker died ({died}), most likely for want of memory: try fewer --num_workers"
        )

    def _died(self) -> str:
        """How a worker ended, "" while all of them run."""
        ended = [worker for worker in self._workers if worker.exitcode is not None]
        return _how(ended[0]) if ended else ""


def _leave(
    thread: threading.Thread, ready: queue.Queue[Item | BaseException], over: threading.Event
) -> None:
    """End the thread and with it the workers, before the interpreter takes both apart."""
    over.set()
    with contextlib.suppress(queue.Empty):
        ready.get_nowait()  # it may wait for room
    if thread is not threading.current_thread():  # a collection of garbage may run in any
        thread.join(_LEAVING)


def _hand_over(
    made: Iterator[Item],
    count: int | None,
    ready: queue.Queue[Item | BaseException],
    over: threading.Event,
) -> None:
    """Pass on all items, then what ended them.

    The workers leave with the loader's iterator, ``made``: it must outlive the news of the end.
    """
    try:
        for item in islice(made, count):
            if not _put(item, ready, over):
                return
    except BaseException as error:
        # Its traceback knows the loader, whose workers would stay for as long as the error does.
        _put(error.with_traceback(None), ready, over)
    else:
        _put(StopIteration(), ready, over)


def _put(
    item: Item | BaseException, ready: queue.Queue[Item | BaseException], over: threading.Event
) -> bool:
    """Wait for room; False if nobody wants the item any more."""
    while not over.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(item, timeout=_PATIENCE)
            return True
    return False


def _how(worker: BaseProcess) -> str:
    code = worker.exitcode
    assert code is not None
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import the main script again.

    They need nothing of it, and it may import mpi4py, whose start-up would hang in a worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
