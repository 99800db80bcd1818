"""What a run would take, told from a few of its steps."""

from __future__ import annotations

import datetime
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from diff_dalle.distributed import World
from diff_dalle.training.checkpoints import checkpoint_bytes
from diff_dalle.training.metrics import Pace
from diff_dalle.training.train_config import TrainConfig

_GIB = 2**30


def forecast(
    cfg: TrainConfig,
    model: nn.Module,
    step: int,
    pace: Pace,
    folder: Path | None,
    files: Sequence[str],
    world: World,
) -> str:
    """A few lines: size, time, memory and files of a run.

    Args:
        cfg: the run as it was asked for.
        model: what it would train.
        step: where it would start.
        pace: of the steps that were tried.
        folder: the run folder that was asked for, if any.
        files: the names that the trial wrote.
        world: the ranks.
    """
    parameters = sum(p.numel() for p in model.parameters())
    steps = max(0, cfg.iterations - step)
    batch = cfg.batch_size * world.size
    time = datetime.timedelta(seconds=round(steps * pace.seconds_per_step))
    rate = batch / max(pace.seconds_per_step, 1e-9)
    saves = -(-steps // cfg.save_interval)
    size = checkpoint_bytes(model, len(cfg.ema_rate)) / _GIB
    where = folder if folder is not None else "a new temporary folder (name one with --log_dir)"
    return "\n".join(
        [
            "dry run: everything works, and nothing was kept. The run would",
            f"  train {parameters:,} parameters from step {step:,} to {cfg.iterations:,}, "
            f"{steps * batch:,} samples in batches of {batch} ({cfg.batch_size} on each of "
            f"{world.size} ranks)",
            f"  take about {time} without evaluations and samples, at "
            f"{pace.seconds_per_step:.2f} s a step ({rate:.1f} img/s)",
            f"  use {peak_memory(world.device) / _GIB:.2f} GiB at its peak on this rank",
            f"  write {saves} checkpoints of {size:.2f} GiB each to {where}",
            f"  with files like {', '.join(files)}",
        ]
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or the most that this process held in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
