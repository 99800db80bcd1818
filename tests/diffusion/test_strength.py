"""How strong guidance is at each step: formulas, intervals, look-ups."""

from __future__ import annotations

import math

import pytest
import torch

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.diffusion.strength import (
    SCHEDULES,
    check_schedule,
    parse_interval,
    scale_at_step,
    scale_at_time,
    step_scales,
)
from diff_dalle.errors import UsageError

LINEAR = GaussianDiffusion(Schedule.make("linear", 1000))


def scales_of(
    diffusion: GaussianDiffusion,
    scale: float = 3.0,
    unguided: float = 1.0,
    interval: str = "all",
    schedule: str = "constant",
) -> torch.Tensor:
    return step_scales(diffusion, scale, unguided=unguided, interval=interval, schedule=schedule)


def levels(*wanted: float) -> GaussianDiffusion:
    """A process with these noise levels sqrt((1 - alpha_bar) / alpha_bar)."""
    alpha_bar = torch.tensor([1 / (1 + level**2) for level in wanted], dtype=torch.float64)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return GaussianDiffusion(Schedule.from_betas(1 - alpha_bar / before))


def test_schedules_grow_towards_the_image() -> None:
    """Step 0 is the image's; tau at four steps is 1/8, 3/8, 5/8 and 7/8."""
    four = LINEAR.respace("4")
    linear = scales_of(four, schedule="linear")
    assert linear.tolist() == pytest.approx([1 + 2 * c for c in (1.75, 1.25, 0.75, 0.25)])
    cosine = scales_of(four, scale=5.0, unguided=0.0, schedule="cosine")
    expected = [5 * (1 + math.cos(math.pi * tau)) for tau in (1 / 8, 3 / 8, 5 / 8, 7 / 8)]
    assert cosine.tolist() == pytest.approx(expected)
    assert scales_of(four).tolist() == [3.0] * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_schedule_guides_as_much_in_sum(schedule: str, steps: int) -> None:
    scales = scales_of(LINEAR.respace(str(steps)), scale=7.5, schedule=schedule)
    assert float(scales.mean()) == pytest.approx(7.5)
    assert (scales.diff() <= 0).all() and (scales >= 1).all()


@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ("all", [1, 1, 1]),
        ("0,inf", [1, 1, 1]),
        ("0.3,0.6", [0, 1, 0]),
        ("0.6,inf", [0, 0, 1]),
        ("0,0.3", [1, 0, 0]),
        ("3,4", [0, 0, 0]),
    ],
)
@pytest.mark.parametrize("unguided", [0.0, 1.0])
def test_there_is_no_guidance_outside_the_interval(
    interval: str, inside: list[int], unguided: float
) -> None:
    found = scales_of(levels(0.2, 0.5, 2.0), unguided=unguided, interval=interval)
    assert found.tolist() == [3.0 if there else unguided for there in inside]


def test_an_interval_holds_its_upper_end_and_not_its_lower() -> None:
    """As in Kynkäänniemi et al. 2024, so that neighbouring intervals share no step."""
    process = levels(0.5, 1.0)
    exact = float(((1 - process.alpha_bar[0]) / process.alpha_bar[0]).sqrt())
    assert scales_of(process, interval=f"{exact!r},9").tolist() == [1.0, 3.0]
    assert scales_of(process, interval=f"0,{exact!r}").tolist() == [3.0, 1.0]


def test_the_interval_does_not_move_the_schedule() -> None:
    four = LINEAR.respace("4")
    whole, part = (scales_of(four, schedule="linear", interval=i) for i in ("all", "0,1"))
    inside = part != 1
    assert 0 < inside.sum() < 4 and torch.equal(part[inside], whole[inside])


@pytest.mark.parametrize("rescale", [False, True])
def test_scales_are_found_by_what_the_network_is_told(rescale: bool) -> None:
    base = Schedule.make("cosine", 400)
    process = GaussianDiffusion(base, rescale_timesteps=rescale).respace("10")
    scales = scales_of(process, schedule="linear")
    t = torch.tensor([9, 0, 4, 4])
    told = process.model_time(t)
    assert torch.equal(scale_at_time(process, scales)(told), scales[t])
    assert torch.equal(scale_at_step(scales)(t), scales[t])
    nearby = told + 0.2  # a time between two steps
    assert torch.equal(scale_at_time(process, scales)(nearby), scales[t])


def test_one_scale_for_all_steps_is_not_looked_up() -> None:
    """A look-up waits for the device."""
    process = LINEAR.respace("10")
    nowhere = torch.empty(3, device="meta")  # holds no values
    for at in (scale_at_step(scales_of(process)), scale_at_time(process, scales_of(process))):
        assert at(nowhere).tolist() == [3.0] * 3


@pytest.mark.parametrize("text", ["5,0.3", "1,1", "-1,2", "1", "1,2,3", "a,b", "nan,1", "", "1;2"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--classifier_interval is ") as error:
        parse_interval(text, "classifier_interval")
    assert "\n" not in str(error.value)


def test_an_unknown_schedule_is_refused_with_the_nearest() -> None:
    check_schedule("cosine")
    with pytest.raises(UsageError, match="--guidance_schedule is 'linaer'.*did you mean linear"):
        check_schedule("linaer")
