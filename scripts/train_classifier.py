"""Train a noised CLIP, which guides sampling at one stage of the cascade.

python scripts/train_classifier.py --data_dir D/train --val_data_dir D/val --log_dir runs/clip
"""

from __future__ import annotations

import dataclasses

from diff_dalle.config import (
    ClassifierRun,
    make_classifier,
    make_diffusion,
    make_record,
    parse_run,
    with_vocabulary,
)
from diff_dalle.distributed import run_main, start
from diff_dalle.training.classifier_task import ClassifierTask
from diff_dalle.training.loop import train
from diff_dalle.training.precision import Precision
from diff_dalle.training.run_data import open_run_data


def train_classifier(argv: list[str]) -> None:
    run = parse_run(ClassifierRun, argv)
    world = start(run.train.device)
    run = dataclasses.replace(run, train=run.train.on_ranks(world.size))
    data = open_run_data(
        run.data, run.train, image_size=run.image_size, text=run.captions, world=world
    )
    run = with_vocabulary(run, data)
    clip = make_classifier(run).to(world.device)
    task = ClassifierTask(
        clip,
        make_diffusion(run),
        run.task,
        run.timesteps,
        world=world,
        precision=Precision(run.precision, world.device),
        microbatch=run.train.microbatch,
    )
    record = make_record(run, data)
    train(task, data.batches, run.train, run.optim, record=record, world=world)


def main() -> None:
    run_main(train_classifier)


if __name__ == "__main__":
    main()
