"""Seconds and evaluations a stage, by a clock that only networks move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diff_dalle import Cascade
from diff_dalle.cascade import turns
from diff_dalle.cascade.offload import Residence
from diff_dalle.cascade.timing import Timing
from diff_dalle.models.generator import Generator

PROMPTS = ["a red circle", "a star"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An evaluation takes as many seconds as the picture has pixels a side."""
    clock = SimpleNamespace(now=0.0)
    forward = Generator.forward

    def slow(self: Generator, x_t: torch.Tensor, *args: Any) -> torch.Tensor:
        clock.now += x_t.shape[-1]
        return forward(self, x_t, *args)

    monkeypatch.setattr(Generator, "forward", slow)
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_every_stage_has_its_seconds_and_evaluations(
    guided: Cascade, clock: SimpleNamespace
) -> None:
    result = guided.sample(PROMPTS, steps=[4, 2, 3], batch_size=1)
    assert result.evaluations == [4, 2, 3]
    assert result.seconds == [2 * 4 * 16, 2 * 2 * 32, 2 * 3 * 64]  # two batches
    together = guided.sample(PROMPTS, steps=[4, 2, 3], batch_size=2)
    assert together.evaluations == [4, 2, 3] and together.seconds == [4 * 16, 2 * 32, 3 * 64]


def test_candidates_count(guided: Cascade, clock: SimpleNamespace) -> None:
    result = guided.sample(PROMPTS, steps=2, rerank=5, batch_size=2)
    assert result.evaluations == [10, 2, 2]
    assert result.seconds == [10 * 16, 2 * 32, 2 * 64]


def test_the_clock_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.accelerator, "synchronize", told.append)
    ticks = iter([1.0, 4.0])

    def now() -> float:
        told.append("clock")
        return next(ticks)

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=now))
    stage: Any = SimpleNamespace(device=device)
    turn = turns.Turns([stage], Residence(offload=False))
    with turn.of(0):
        told.append("work")
    assert told == [device, "clock", "work", device, "clock"] and turn.seconds == [3.0]


def test_a_run_tells_what_it_drew() -> None:
    parts = [Timing(images=3, seconds=(6.0, 30.0)), Timing(images=1, seconds=(2.0, 8.5))]
    timing = Timing.total([*parts, Timing(images=0, seconds=(0.0, 0.0))])
    assert timing.per_image == [2.0, 9.625]
    assert timing.describe(["64", "256"]) == ["64 px 2 s, 256 px 9.6 s a picture (4 drawn)"]
    assert timing.to_json() == {"images": 4, "seconds_per_image": [2.0, 9.625]}
    nothing = Timing(images=0, seconds=(0.0, 0.0))
    assert nothing.describe(["64", "256"]) == [] and nothing.per_image == []
