"""What the ranks of a training run must agree on; rank 0 writes what it found as JSON.

Usage: loop_two_ranks.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loop_tiny import (
    ALONE,
    OPTIM,
    Stream,
    ToyTask,
    classifier_task,
    generator_task,
    held_out,
    record,
    tiny_clip,
    tiny_generator,
    train_config,
)
from torch import Tensor

from diff_dalle.diffusion.timesteps import TimestepConfig
from diff_dalle.distributed import World, all_gather_objects, barrier, run_main, start, stop
from diff_dalle.training.generator_task import GeneratorTaskConfig
from diff_dalle.training.loop import Data, train
from diff_dalle.training.previews import PreviewConfig
from diff_dalle.training.resume import Start
from diff_dalle.training.tasks import Task
from diff_dalle.training.trainer import Trainer

Found = dict[str, Any]
BATCH = 6  # global; sample 4, on the second rank, is broken
MakeTask = Callable[..., Task]


def main(argv: list[str]) -> int:
    world = start("cpu", timeout_s=60)
    torch.set_num_threads(1)
    found: Found = {}
    folder = Path(argv[0])
    gradients_and_weights(world, found)
    loss_aware_sampler(world, found)
    evaluations(world, found)
    interrupted_runs(world, found, folder)
    averages_alone(world, found, folder)
    skipped_step(world, found, folder)
    bad_samples_and_previews(world, found, folder)
    dry_run(world, found, folder)
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    stop(world)
    return 0


def generator(dtype: torch.dtype, world: World, microbatch: int = -1) -> Task:
    """An upsampler with every random draw switched on."""
    return generator_task(
        tiny_generator(small_size=8, awake=True, dtype=dtype),
        GeneratorTaskConfig(gaussian_blur=True, cond_drop_prob=0.3),
        world=world,
        microbatch=microbatch,
    )


def classifier(dtype: torch.dtype, world: World, microbatch: int = -1) -> Task:
    """A noised CLIP."""
    model = tiny_clip(awake=True, dtype=dtype)
    return classifier_task(model, world=world, microbatch=microbatch)


MAKE: dict[str, MakeTask] = {"generator": generator, "classifier": classifier}


def trainer_of(task: Task, world: World, **optim: Any) -> tuple[Trainer, Stream]:
    stream = Stream(batch_size=BATCH // world.size, world=world, bad=(4,))
    cfg = train_config(Path("unused"), batch_size=BATCH // world.size)
    config = dataclasses.replace(OPTIM, **optim)
    trainer = Trainer(task, Data(train=stream), cfg, config, record(task.kind), world)
    if world.rank == 1:  # what rank 1 starts from must not matter
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.add_(1.0)
    trainer.begin(Start())
    return trainer, stream


def after_steps(task: Task, world: World, steps: int, **optim: Any) -> Trainer:
    trainer, stream = trainer_of(task, world, **optim)
    batches = stream(0)
    for _ in range(steps):
        trainer.train_step(next(batches))
    return trainer


def gradients_and_weights(world: World, found: Found) -> None:
    """Two processes against one: gradients in fp32, weights and averages in float64."""
    for name, make in MAKE.items():
        # Clipping is off, or it would hide a factor of the world size.
        # One sample at a time in both: a convolution of another batch size may choose another
        # algorithm, whose rounding alone is above 1e-6.
        several = after_steps(make(torch.float32, world, 1), world, 1, max_grad_norm=0.0)
        one = after_steps(make(torch.float32, ALONE, 1), ALONE, 1, max_grad_norm=0.0)
        pairs = [
            (p.grad, q.grad)
            for p, q in zip(
                several.task.model.parameters(), one.task.model.parameters(), strict=True
            )
        ]
        found[f"{name} parameters without gradient"] = sum(p is None for p, _ in pairs)
        found[f"{name} gradient error"] = relative_error(pairs)
        found[f"{name} worst tensor's gradient error"] = worst_error(pairs)

        several = after_steps(make(torch.float64, world, 2), world, 3)
        one = after_steps(make(torch.float64, ALONE), ALONE, 3)
        for part in ("weights", "averages"):
            found[f"{name} {part} error"] = relative_error(
                list(zip(numbers(several, part), numbers(one, part), strict=True))
            )
        found[f"{name} samples"] = several.samples


def numbers(trainer: Trainer, part: str) -> list[Tensor]:
    if part == "weights":
        return [p.detach() for p in trainer.task.model.parameters()]
    return list(trainer.ema.state_dicts()["0.9"].values())


def relative_error(pairs: list[tuple[Any, Any]]) -> float:
    """The norm of all differences together, relative to the norm of all numbers."""
    difference = math.hypot(*(float((a.double() - b.double()).norm()) for a, b in pairs))
    return difference / math.hypot(*(float(b.double().norm()) for _, b in pairs))


def worst_error(pairs: list[tuple[Any, Any]]) -> float:
    """The largest relative error of any tensor.

    A tenth of the mean norm counts as the norm of any smaller tensor: where a gradient is zero
    analytically, its norm is rounding alone.
    """
    norms = [float(b.double().norm()) for _, b in pairs]
    floor = sum(norms) / len(norms) / 10
    return max(
        float((a.double() - b.double()).norm()) / max(norm, floor)
        for (a, b), norm in zip(pairs, norms, strict=True)
    )


def loss_aware_sampler(world: World, found: Found) -> None:
    """Every rank remembers every rank's losses, in the order of one process."""

    def memory(of: World) -> dict[str, Tensor]:
        task = generator_task(
            tiny_generator(awake=True, dtype=torch.float64),
            timesteps=TimestepConfig(schedule_sampler="loss-second-moment"),
            world=of,
        )
        after_steps(task, of, 2)
        return task.state_dict()["timestep_sampler"]

    several, one = memory(world), memory(ALONE)
    same = torch.equal(several["counts"], one["counts"])
    close = torch.allclose(several["losses"], one["losses"], rtol=1e-9)
    found["sampler memory"] = all_gather_objects(same and close, world)
    found["sampler losses"] = int(several["counts"].sum())


def evaluations(world: World, found: Found) -> None:
    """Held-out numbers do not depend on how many ranks share the samples."""
    for name, make in MAKE.items():
        several = make(torch.float64, world).evaluate(held_out(world))
        one = make(torch.float64, ALONE).evaluate(held_out(ALONE))
        # Which caption is "the next one's" depends on the batches, so only these are equal.
        shared = [n for n in one if "shuffled" not in n and "caption" not in n]
        found[f"{name} evaluation error"] = max(
            abs(several[n] - one[n]) / max(abs(one[n]), 1e-3) for n in shared
        )
        found[f"{name} evaluation everywhere"] = len(
            {json.dumps(values) for values in all_gather_objects(several, world)}
        )


def trained(
    task: Task,
    folder: Path,
    world: World,
    stream: Stream,
    previews: PreviewConfig | None = None,
    **cfg: Any,
) -> None:
    data = Data(train=stream, val=lambda: held_out(world))
    config = train_config(folder, batch_size=stream.batch_size, **cfg)
    rest = {"previews": previews, "record": record(task.kind), "world": world}
    train(task, data, config, OPTIM, **rest)


def interrupted_runs(world: World, found: Found, folder: Path) -> None:
    """12 steps against 5 + 7, with dropout; then one process goes on with the order."""

    def task() -> Task:
        model = tiny_generator(dropout=0.3, awake=True)
        return generator_task(model, world=world, microbatch=2)

    straight, broken = Stream(batch_size=3, world=world), Stream(batch_size=3, world=world)
    trained(task(), folder / "straight", world, straight, iterations=12)
    trained(task(), folder / "broken", world, broken, iterations=5)
    trained(task(), folder / "broken", world, broken, iterations=12)
    seen = [set(part) for part in all_gather_objects(straight.seen, world)]
    found["samples of both ranks"] = len(seen[0] & seen[-1]) if world.size > 1 else 0
    found["samples in all"] = len(set().union(*seen))
    found["order kept"] = all(all_gather_objects(straight.seen == broken.seen, world))
    barrier(world)


def averages_alone(world: World, found: Found, folder: Path) -> None:
    """A run of both ranks that starts from an explicit file of averaged weights."""
    model = tiny_generator(awake=True)
    task, stream = generator_task(model, world=world), Stream(batch_size=3, world=world)
    trained(task, folder / "averaged", world, stream, iterations=2)
    barrier(world)
    file = folder / "averaged" / "ema_0.9_000002.pt"
    task = generator_task(tiny_generator(), world=world)
    stream = Stream(batch_size=3, world=world)
    trained(task, folder / "from", world, stream, iterations=3, resume_checkpoint=str(file))
    everyone = all_gather_objects([p.detach().clone() for p in task.model.parameters()], world)
    found["averages alone keep ranks equal"] = all(
        torch.equal(a, b) for part in everyone for a, b in zip(part, everyone[0], strict=True)
    )


def skipped_step(world: World, found: Found, folder: Path) -> None:
    """A loss that is not finite on rank 1 alone is skipped by both, at the same step."""
    spoil = {2: math.nan} if world.rank == world.size - 1 else {}
    task = ToyTask(world=world, spoil=spoil)
    stream = Stream(batch_size=2, world=world)
    trained(task, folder / "skipped", world, stream, iterations=5, save_interval=1)
    weights = [p.detach().clone() for p in task.model.parameters()]
    everyone = all_gather_objects(weights, world)
    found["skip keeps ranks equal"] = all(
        torch.equal(a, b) for part in everyone for a, b in zip(part, everyone[0], strict=True)
    )


def bad_samples_and_previews(world: World, found: Found, folder: Path) -> None:
    """Bad samples of all ranks reach the file; the grid holds every rank's columns."""
    stream = Stream(batch_size=2, world=world, bad=(1, 2, 7))
    task = generator_task(tiny_generator(awake=True), world=world)
    previews = PreviewConfig(num_preview=4)
    trained(task, folder / "bad", world, stream, previews, iterations=2, log_interval=2)


def dry_run(world: World, found: Found, folder: Path) -> None:
    """Nothing is left, whoever wrote it."""
    task = classifier_task(tiny_clip(), world=world)
    trained(task, folder / "dry", world, Stream(batch_size=2, world=world), dry_run=2, iterations=9)
    found["dry run left"] = (folder / "dry").exists()


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
