"""Processes that draw or encode for this one, and how any of ours ends with the one it serves.

It imports no torch, so that they start in a moment and stay small.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait


def make_pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes that start afresh: a fork would copy threads' locks (pyarrow, tokenizers, torch).

    They leave with this process, however it goes.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_set_up)


def leave_with_parent() -> None:
    """From now on end this process when the one that asked for it is gone, however it went."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _set_up() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends them
    leave_with_parent()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
