"""The only training loop: `train`. What is trained, and how, is the task's business."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from diff_dalle.distributed import (
    World,
    all_gather_objects,
    barrier,
    broadcast_object,
    errors_to,
)
from diff_dalle.errors import UsageError
from diff_dalle.training.checkpoints import checkpoint_bytes
from diff_dalle.training.files import require_room
from diff_dalle.training.forecast import forecast
from diff_dalle.training.lock import locked
from diff_dalle.training.metrics import Pace
from diff_dalle.training.optim import OptimConfig
from diff_dalle.training.previews import PreviewConfig, Previews
from diff_dalle.training.report import Report
from diff_dalle.training.resume import (
    RunRecord,
    Start,
    choose_folder,
    find_start,
    holds_run,
    named_folder,
    open_folder,
)
from diff_dalle.training.session import Session, choose_previews
from diff_dalle.training.tasks import Task
from diff_dalle.training.train_config import TrainConfig
from diff_dalle.training.trainer import Data, Trainer

__all__ = ["Data", "RunRecord", "TrainConfig", "train"]


def train(
    task: Task,
    data: Data,
    cfg: TrainConfig,
    optim: OptimConfig,
    *,
    previews: PreviewConfig | None = None,
    record: RunRecord,
    world: World,
) -> Path | None:
    """Train a task from where its run folder stands to ``cfg.iterations`` steps.

    Every rank calls this with its own part of the data. Rank 0 writes and prints.

    Args:
        task: the model and its loss.
        data: where batches come from.
        cfg: how long, what to keep and where.
        optim: the optimizer and its rate.
        previews: grids of samples on the way; None for a task that has none.
        record: what the run is; kept in its checkpoints, and compared when it goes on.
        world: the ranks.
    Returns:
        The run folder; None for a dry run, which leaves none.
    Raises:
        UsageError: a folder or checkpoint of another run, a full disk, or steps that are not
            finite again and again.
    """
    report = Report(shown=world.is_main)
    if cfg.dry_run:
        try_out(task, data, cfg, optim, previews, record, world, report)
        return None
    folder = choose_folder(cfg, world)
    report.say(f"run folder: {folder}")
    with contextlib.ExitStack() as stack:
        known = holds_run(folder)
        if known and world.is_main:  # the only one that writes
            stack.enter_context(locked(folder))
        barrier(world)  # nobody looks for a checkpoint before the folder is ours
        start = agreed_start(cfg, record, folder, world, report)
        trainer = Trainer(task, data, cfg, optim, record, world)
        trainer.begin(start)
        del start  # as large as the model, its averages and the optimizer together
        if trainer.held_out is not None:
            trainer.held_out.recall(folder, record, world)
        grids = choose_previews(trainer, previews)
        if world.is_main:
            require_room(folder, checkpoint_bytes(task.model, len(cfg.ema_rate)))
            if not known:
                stack.enter_context(locked(folder))
        open_folder(folder, record, world)
        with errors_to(folder, world):
            run(trainer, grids, folder, report)
    report.say(f"run folder: {folder}")
    return folder


def agreed_start(
    cfg: TrainConfig, record: RunRecord, folder: Path, world: World, report: Report
) -> Start:
    """Where the run begins, the same on every rank, and say so (a collective).

    Raises:
        UsageError: see `find_start`; or the ranks see different files.
    """
    start = find_start(cfg, record, folder, report.say)
    steps = all_gather_objects(start.step, world)
    if len(set(steps)) > 1:
        raise UsageError(
            f"the ranks find different checkpoints in {folder} (steps {min(steps)} to "
            f"{max(steps)}): give a --log_dir that all machines share, and start again"
        )
    for note in start.notes:
        report.say(note)
    if start.state is not None:
        before = start.state.extra.get("global_batch")
        now = cfg.batch_size * world.size
        if before not in (None, now):
            report.say(
                f"NOTE: a step has {now} samples on all ranks together, it had {before}: "
                f"--global_batch_size {before} keeps it"
            )
    return start


def run(trainer: Trainer, previews: Previews | None, folder: Path, report: Report) -> Pace:
    """Step until the end, and keep what is worth keeping on the way."""
    cfg, pace = trainer.cfg, Pace()
    session = Session(trainer, previews, folder, report)
    batches = trainer.data.train(trainer.samples)
    report.start(trainer.step, cfg.iterations)
    try:
        while trainer.step < cfg.iterations and not session.stopped:
            asked = time.perf_counter()
            batch = next(batches)
            arrived = time.perf_counter()
            trainer.train_step(batch)
            done = time.perf_counter()
            samples = len(batch) * trainer.world.size
            pace.stepped(samples, waiting=arrived - asked, working=done - arrived)
            report.step()
            session.after_step(pace)
    finally:
        report.stop()
        session.log.close()
    return pace


def try_out(
    task: Task,
    data: Data,
    cfg: TrainConfig,
    optim: OptimConfig,
    previews: PreviewConfig | None,
    record: RunRecord,
    world: World,
    report: Report,
) -> None:
    """``--dry_run``: some whole steps, an evaluation, a save and a sample, then a forecast.

    Every rank takes part. Everything is written to a temporary folder, which is removed.
    """
    named, size = named_folder(cfg), checkpoint_bytes(task.model, len(cfg.ema_rate))
    start = Start() if named is None else agreed_start(cfg, record, named, world, report)
    if named is not None and world.is_main:
        require_room(named, size, make=False)
    first = start.step
    short = dataclasses.replace(
        cfg,
        iterations=first + cfg.dry_run,
        save_interval=cfg.dry_run,
        eval_interval=cfg.dry_run if cfg.eval_interval else 0,
        report_to="none",
    )
    small = dataclasses.replace(previews, num_preview=world.size) if previews else None
    trainer = Trainer(task, data, short, optim, record, world)
    trainer.begin(start)
    del start
    grids = choose_previews(trainer, small)
    with _temporary_folder(world) as folder:
        if world.is_main:
            require_room(folder, size, checkpoints=1)
        pace = run(trainer, grids, folder, report)
        # Other machines may not see the folder, which lies on rank 0's.
        files = sorted(path.name for path in folder.iterdir()) if world.is_main else []
    report.say(forecast(cfg, task.model, first, pace, named, files, world))


@contextlib.contextmanager
def _temporary_folder(world: World) -> Iterator[Path]:
    """One folder for all ranks, removed when all have left."""
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory()) if world.is_main else ""
        yield Path(broadcast_object(name, world))
        barrier(world)
