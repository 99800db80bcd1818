"""The turns that the stages take while a batch is drawn: weights in place, seconds counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from diff_dalle.cascade.offload import Residence
from diff_dalle.cascade.stages import Stage


class Turns:
    """The turns of one batch.

    Attributes:
        stages: the cascade.
        seconds: what each stage took so far, all its candidates together; with off-loading the
            way of its weights counts.
    """

    def __init__(self, stages: Sequence[Stage], residence: Residence) -> None:
        self.stages = stages
        self.seconds = [0.0] * len(stages)
        self._residence = residence

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """A stage works inside."""
        stage = self.stages[number]
        _wait_for(stage.device)  # what was begun before is not this stage's
        start = time.perf_counter()
        self._residence.bring(stage)
        yield
        _wait_for(stage.device)
        self.seconds[number] += time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Until a device has done what it was given: work on a GPU goes on behind the program."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
