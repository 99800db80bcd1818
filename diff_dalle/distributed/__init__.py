"""Start-up of one process among many: under ``mpiexec``, under ``torchrun``, or alone.

MPI launches the processes and tells them where they are; ``torch.distributed`` (NCCL on
GPUs, Gloo on CPUs) moves the tensors. mpi4py is imported only where an MPI launcher is
seen, so one process needs no MPI at all. Every collective here is a no-op when alone.

Words: the *world* is all processes of a run, a *rank* is one of them, a *local* rank counts
the processes of one machine. N is the world's size.
"""

from __future__ import annotations

from diff_dalle.distributed.collectives import (
    all_gather,
    all_gather_objects,
    all_gather_with_grad,
    all_reduce_sum_,
    average_gradients_,
    barrier,
    broadcast_object,
    synchronise_parameters,
)
from diff_dalle.distributed.run import errors_to, run_main
from diff_dalle.distributed.startup import start, stop
from diff_dalle.distributed.world import World

__all__ = [
    "World",
    "all_gather",
    "all_gather_objects",
    "all_gather_with_grad",
    "all_reduce_sum_",
    "average_gradients_",
    "barrier",
    "broadcast_object",
    "errors_to",
    "run_main",
    "start",
    "stop",
    "synchronise_parameters",
]
