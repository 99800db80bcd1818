"""Joining and leaving the run: MPI finds the processes, torch.distributed connects them."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterable

import torch
import torch.distributed as dist

# Its functions take the default process group of the moment they are imported as a default
# argument. Imported later (building an optimizer does), they would keep the group's threads
# alive beyond `stop`, and such a thread can abort the interpreter on its way out.
import torch.distributed.nn.functional

from diff_dalle.distributed.collectives import all_gather_objects
from diff_dalle.distributed.world import (
    Launch,
    World,
    choose_device,
    detect_launch,
    require_own_gpus,
    threads_per_rank,
)
from diff_dalle.errors import UsageError

_MEETING = datetime.timedelta(minutes=5)  # how long a rank tries to reach rank 0

# What hydra, Open MPI and Slurm's PMI leave for a child that would start MPI itself.
_MPI_VARIABLES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MPI_LOCAL")


def start(device: str = "auto", *, timeout_s: float = 1800.0) -> World:
    """Join the run that this process was launched into.

    Args:
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        timeout_s: seconds that a collective waits for the other ranks before it raises.
    Returns:
        This process's place. Where the size is above 1, the process group exists; one process
        needs neither it nor MPI.
    Raises:
        UsageError: MPI cannot be loaded, launcher and MPI disagree about the size, there is
            no such GPU, or two ranks share one GPU.
    """
    launch = detect_launch(os.environ)
    if launch.size == 1:
        return World(device=choose_device(device, local_rank=0), launcher=launch.launcher)
    timeout = datetime.timedelta(seconds=timeout_s)
    if launch.launcher == "mpi":
        local_rank, local_size, store = _meet_through_mpi(launch)
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", launch.rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", launch.size))
        store = None
    chosen = choose_device(device, local_rank)
    world = World(
        rank=launch.rank,
        size=launch.size,
        local_rank=local_rank,
        local_size=local_size,
        device=chosen,
        launcher=launch.launcher,
    )
    _start_process_group(world, store, timeout)
    return world


def stop(world: World) -> None:
    """Leave the process group, without waiting for the others.

    Its connections close, so a rank that still waits for this one fails at once.
    """
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _meet_through_mpi(launch: Launch) -> tuple[int, int, dist.Store]:
    """Initialise MPI; returns local rank, local size and a store that all ranks reach.

    Rank 0 serves the store under its host name, or under MASTER_ADDR where that is set.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"a launcher started {launch.size} processes, but MPI cannot be loaded "
            f"({str(error).splitlines()[0]}): pip install -e .[mpich]"
        ) from error
    comm = MPI.COMM_WORLD
    if comm.size != launch.size:
        raise UsageError(
            f"the launcher started {launch.size} processes, but MPI sees {comm.size}: mpi4py "
            "belongs to another MPI than this mpiexec; use the mpiexec that came with mpi4py's"
        )
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.rank, node.size
    node.Free()
    # DataLoader workers and subprocesses must not take themselves for MPI processes.
    for name in [name for name in os.environ if name.startswith(_MPI_VARIABLES)]:
        del os.environ[name]
    # Port 0 lets the system choose: no other run can take the port in between.
    address = os.environ.get("MASTER_ADDR", socket.gethostname())
    if local_size == comm.size:
        address = "127.0.0.1"
    store = None
    if comm.rank == 0:
        store = dist.TCPStore(
            address, 0, comm.size, is_master=True, timeout=_MEETING, wait_for_workers=False
        )
    address, port = comm.bcast((address, store.port if store else 0))
    if store is None:
        store = dist.TCPStore(address, port, comm.size, is_master=False, timeout=_MEETING)
    return local_rank, local_size, store


def _start_process_group(
    world: World, store: dist.Store | None, timeout: datetime.timedelta
) -> None:
    """Initialise torch.distributed, check the GPUs and set the number of threads."""
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    host = socket.gethostname()
    gpu = None
    if world.device.type == "cuda":
        gpu = f"{host}, {torch.cuda.get_device_properties(world.device).uuid}"
    cores = frozenset((host, core) for core in _usable_cores())
    # Objects travel through Gloo: NCCL has not started yet.
    gathered = all_gather_objects((gpu, cores), world)
    require_own_gpus([gpu for gpu, _ in gathered])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank([cores for _, cores in gathered], world.rank))


def _usable_cores() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)
