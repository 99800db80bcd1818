"""The place of one process: what its launcher says, its device and its share of the cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from diff_dalle.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    launcher: str = "alone"  # "mpi", "torchrun" or "alone"

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that writes files and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment variables say."""

    launcher: str
    rank: int
    size: int


def detect_launch(environment: Mapping[str, str]) -> Launch:
    """Read the launcher, the rank and the world's size from environment variables.

    torchrun comes first, since Slurm may have started it; bare RANK and WORLD_SIZE come
    last, since a cluster may set them for a container in which MPI runs.

    Raises:
        UsageError: Slurm started several tasks without MPI, which would be n lone runs.
    """
    env = environment
    if "TORCHELASTIC_RUN_ID" in env:
        return Launch("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]))
    if "OMPI_COMM_WORLD_SIZE" in env:
        return Launch("mpi", int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"]))
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        return Launch("mpi", int(env["PMI_RANK"]), int(env["PMI_SIZE"]))
    slurm_tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if slurm_tasks > 1 and ("PMIX_RANK" in env or "PMI_RANK" in env):
        return Launch("mpi", int(env["SLURM_PROCID"]), slurm_tasks)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        return Launch("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]))
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UsageError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks without MPI, each would run "
            "alone: add --mpi=pmix or --mpi=pmi2 to srun"
        )
    return Launch("alone", 0, 1)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of one rank: the local rank counts the GPUs that CUDA shows this process.

    Where every rank is shown a single GPU of its own, that one is taken.

    Raises:
        UsageError: no GPU although one was asked for, or more local ranks than GPUs.
    """
    try:
        asked = None if device == "auto" else torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device is {device!r}: it must be auto, cpu, cuda or cuda:N") from None
    visible = torch.cuda.device_count()
    if asked is None:
        asked = torch.device("cuda" if visible else "cpu")
    if asked.type != "cuda":
        return asked
    if visible == 0:
        raise UsageError(f"--device is {device!r}, but CUDA shows no GPU: use --device cpu")
    wanted = local_rank if asked.index is None else asked.index
    index = 0 if visible == 1 and asked.index is None else wanted
    if index >= visible:
        raise UsageError(
            f"GPU {index} was asked for, but CUDA shows {visible} to this process: start at "
            "most one process a GPU, or change --device or CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def require_own_gpus(gpus: Sequence[str | None]) -> None:
    """Refuse two ranks on one GPU, which NCCL would meet with a hang or an obscure error.

    Args:
        gpus: for every rank, a name unique to its GPU, or None for a rank on a CPU.
    Raises:
        UsageError: names the ranks and the GPU.
    """
    for gpu in dict.fromkeys(gpus):
        ranks = [str(rank) for rank, other in enumerate(gpus) if other == gpu]
        if gpu is not None and len(ranks) > 1:
            raise UsageError(
                f"ranks {' and '.join(ranks)} share one GPU ({gpu}): start one process a GPU, "
                "or give each its own through CUDA_VISIBLE_DEVICES"
            )


def threads_per_rank(cores: Sequence[frozenset[tuple[str, int]]], rank: int) -> int:
    """CPU threads for one rank: its cores, divided by the ranks that may run on them.

    Args:
        cores: for every rank, the (machine, core) pairs it may use. A launcher that binds
            its processes gives each its own, one that does not gives all of them the same.
    """
    sharing = sum(1 for other in cores if other & cores[rank])
    return max(1, len(cores[rank]) // sharing)
