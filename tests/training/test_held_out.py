"""Held-out evaluations of the weights as they are and of their average."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from loop_tiny import batch_of, generator_task, tiny_generator

from diff_dalle.data.batch import Batch
from diff_dalle.training.ema import EMA
from diff_dalle.training.held_out import HeldOut


def test_both_are_measured_on_data_that_are_read_once() -> None:
    task = generator_task(tiny_generator(awake=True, cond_text=False))
    ema = EMA(task.model, (0.9,))
    with torch.no_grad():
        for weight in task.model.parameters():
            weight.mul_(1.5)
    data, opened = [batch_of([i], text=False) for i in range(2)], []

    def read() -> Iterator[Batch]:
        opened.append(1)
        yield from data

    values = HeldOut(task, ema, read).evaluate()
    assert len(opened) == 1
    raw = task.evaluate(data)
    with ema.applied(0.9):
        averaged = task.evaluate(data)
    assert raw["val_loss"] != averaged["val_loss"]
    assert values == raw | {f"ema_{name}": value for name, value in averaged.items()}
