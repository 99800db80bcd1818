"""Train one generator of the cascade: a base model, or an upsampler with `--small_size`.

python scripts/train_generator.py --preset base-64 --data_dir D/train --log_dir runs/base
mpiexec -n 8 python scripts/train_generator.py --image_size 256 --small_size 64 ...
"""

from __future__ import annotations

import dataclasses

from diff_dalle.config import (
    GeneratorRun,
    make_diffusion,
    make_generator,
    make_record,
    parse_run,
    with_vocabulary,
)
from diff_dalle.distributed import run_main, start
from diff_dalle.training.generator_task import GeneratorTask
from diff_dalle.training.loop import train
from diff_dalle.training.precision import Precision
from diff_dalle.training.run_data import open_run_data


def train_generator(argv: list[str]) -> None:
    run = parse_run(GeneratorRun, argv)
    world = start(run.train.device)
    run = dataclasses.replace(run, train=run.train.on_ranks(world.size))
    data = open_run_data(
        run.data, run.train, image_size=run.image_size, text=run.captions, world=world
    )
    run = with_vocabulary(run, data)
    generator = make_generator(run).to(world.device)
    task = GeneratorTask(
        generator,
        make_diffusion(run),
        run.task,
        run.loss,
        run.timesteps,
        world=world,
        precision=Precision(run.precision, world.device),
        microbatch=run.train.microbatch,
    )
    record = make_record(run, data)
    train(
        task, data.batches, run.train, run.optim, previews=run.previews, record=record, world=world
    )


def main() -> None:
    run_main(train_generator)


if __name__ == "__main__":
    main()
