"""Guidance in an interval, by a schedule and away from something, against exact mixtures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.guidance import Model, classifier_free
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.diffusion.strength import scale_at_time, step_scales

MIXTURE = runpy.run_path(str(Path(__file__).with_name("test_exact_mixture.py")))
component_and_all, distance, draw, network, process, score = (
    MIXTURE[name]
    for name in ("component_and_all", "distance", "draw", "network", "process", "score")
)
SCALE = 2.5
DIFFUSION = process("16")


class Counted:
    """A model that counts the pictures that it is asked about."""

    def __init__(self, model: Model) -> None:
        self.model, self.asked = model, 0

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.asked += len(x_t)
        return self.model(x_t, time)


def guided(
    interval: str = "all", schedule: str = "constant", scale: float = SCALE
) -> tuple[Model, Counted]:
    """Guidance from the mixture to component 0, and both of its branches counted."""
    scales = step_scales(DIFFUSION, scale, unguided=1.0, interval=interval, schedule=schedule)
    counted = Counted(lambda x_t, time: component_and_all(x_t, time))
    alone = network("eps", (0,))

    def conditional(x_t: Tensor, time: Tensor) -> Tensor:
        counted.asked += len(x_t)
        return alone(x_t, time)

    at = scale_at_time(DIFFUSION, scales)
    model = classifier_free(counted, at, learned_variance=False, model_cond=conditional)
    return model, counted


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_interval_that_holds_every_level_is_full_guidance(name: str) -> None:
    full = classifier_free(component_and_all, SCALE, learned_variance=False)
    expected = draw(name, full, DIFFUSION)
    for interval in ("all", "0,inf", "0.0001,1000"):
        assert torch.equal(draw(name, guided(interval)[0], DIFFUSION), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_interval_that_holds_no_level_is_no_guidance(name: str) -> None:
    model, counted = guided("5000,6000")
    found = draw(name, model, DIFFUSION)
    alone = Counted(network("eps", (0,)))
    assert torch.equal(found, draw(name, alone, DIFFUSION))
    assert counted.asked == alone.asked


def test_only_guided_steps_cost_two_evaluations() -> None:
    levels = ((1 - DIFFUSION.alpha_bar) / DIFFUSION.alpha_bar).sqrt()
    low, high = (float(levels[3:5].mean()), float(levels[8:10].mean()))  # steps 4 ... 8
    model, counted = guided(f"{low},{high}")
    count = len(draw("ddim", model, DIFFUSION))
    assert counted.asked == (16 + 5) * count


def test_guidance_by_a_schedule_is_that_of_each_steps_scale() -> None:
    scales = step_scales(DIFFUSION, SCALE, unguided=1.0, interval="all", schedule="cosine")
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(-1, 1, 1, 1)
    time = DIFFUSION.model_time(torch.arange(16))
    cond, uncond = network("eps", (0,))(x, time), network()(x, time)
    expected = uncond + scales.reshape(-1, 1, 1, 1) * (cond - uncond)
    torch.testing.assert_close(guided(schedule="cosine")[0](x, time), expected)
    # Strong at the image and weak at the noise, so the density is another one.
    constant = draw("ddim", guided()[0], DIFFUSION)
    growing = draw("ddim", guided(schedule="linear")[0], DIFFUSION)
    assert float((constant - growing).abs().mean()) > 0.005


def away_from(component: int, scale: float) -> Model:
    """Component 0, led away from another in the null caption's place."""

    def both(x_t: Tensor, time: Tensor) -> Tensor:
        (x_c, x_n), (time_c, time_n) = x_t.chunk(2), time.chunk(2)
        wanted, negative = network("eps", (0,)), network("eps", (component,))
        return torch.cat([wanted(x_c, time_c), negative(x_n, time_n)])

    return classifier_free(both, scale, learned_variance=False)


def test_a_negative_prompt_is_the_gradient_away_from_its_component() -> None:
    """eps_n + s (eps_c - eps_n) is eps_c, led up by (s - 1) log p(x_t | c) / p(x_t | n)."""
    t = torch.arange(16)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(-1, 1, 1, 1)
    a = DIFFUSION.alpha_bar.reshape(-1, 1, 1, 1)
    gradient = (SCALE - 1) * (score(x, a, (0,)) - score(x, a, (1,)))
    led = network("eps", (0,))(x, DIFFUSION.model_time(t)) - (1 - a).sqrt() * gradient
    found = away_from(1, SCALE)(x, DIFFUSION.model_time(t))
    torch.testing.assert_close(found, led, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_negative_prompt_leads_further_away_than_the_null_caption(name: str) -> None:
    """Component 1 lies above component 0, so pictures end below it."""
    fine: GaussianDiffusion = process("64")
    alone = float(draw(name, network("eps", (0,)), fine).mean())
    null = classifier_free(component_and_all, 1.5, learned_variance=False)
    from_all, from_one = (float(draw(name, m, fine).mean()) for m in (null, away_from(1, 1.5)))
    assert from_one < from_all - 0.01 < alone - 0.02


def test_a_negative_prompt_equal_to_the_prompt_changes_nothing() -> None:
    found = draw("ddim", away_from(0, 7.0), process("64"))
    assert distance(found, (0,)) < 0.03
