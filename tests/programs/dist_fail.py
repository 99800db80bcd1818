"""Two ranks, of which one goes wrong in the way that the first argument names."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from diff_dalle.distributed import all_reduce_sum_, errors_to, run_main, start, stop
from diff_dalle.errors import UsageError


def main(argv: list[str]) -> int:
    how, folder = argv
    if how == "usage-before-start":
        raise UsageError("--lr is -1.0: it must be positive")
    world = start("cpu", timeout_s=600)
    with errors_to(folder, world):
        all_reduce_sum_(torch.ones(1), world)
        if how == "usage-on-all":
            raise UsageError("the folder is empty: give another")
        if world.rank == 1:
            go_wrong(how)
        for _ in range(3000):  # far longer than the job may live
            all_reduce_sum_(torch.ones(1), world)
            time.sleep(0.1)
    stop(world)
    return 0


def go_wrong(how: str) -> None:
    if how == "raise":
        raise RuntimeError("a planted failure\nwith a second line")
    if how == "usage-on-one":
        raise UsageError("a file that only this machine lacks: copy it")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "os-exit-0":
        os._exit(0)
    if how == "sys-exit-0":
        sys.exit(0)
    if how == "interrupt":
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main, alone=sys.argv[1] == "alone")
