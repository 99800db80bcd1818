"""Editing against known answers: exact on what is known, and what the projection does beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.diffusion.editing import KeepKnown, first_steps, on_sphere
from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.diffusion.thresholding import make_clip

BASE = Schedule.make("linear", 8000)
COVARIANCE = 0.25 * torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
KNOWN = 0.7  # value of the known pixel, the first of two
DRAWN = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
PICTURE = torch.tensor([KNOWN, 9.0], dtype=torch.float64).reshape(1, 1, 1, 2)
SAMPLED = {**SAMPLERS, "ddim, eta 1": partial(SAMPLERS["ddim"], eta=1.0)}
DETERMINISTIC = ("ddim", "dpmpp_2m", "unipc", "heun")


def process(spec: str) -> GaussianDiffusion:
    return GaussianDiffusion(BASE.respace(spec), prediction="x0", variance="fixed_small")


def network(x_t: Tensor, time: Tensor) -> Tensor:
    """The mean of x_0 given x_t for two pixels of that covariance."""
    a = BASE.alpha_bar[time[0]]
    noised = a * COVARIANCE + (1 - a) * torch.eye(2, dtype=torch.float64)
    return x_t @ (a.sqrt() * COVARIANCE @ torch.linalg.inv(noised)).T


def noise(step: int, x: Tensor) -> Tensor:
    return keyed_noise.normal(torch.arange(len(x)), tuple(x.shape[1:]), stream=step).to(x.dtype)


def draw(
    name: str,
    spec: str,
    *,
    model: Callable = network,
    count: int = 1000,
    clip: Clip = False,
    guide: Callable | None = None,
) -> Tensor:
    """Values [count,2] of both pixels, with the first one known."""
    x_T = noise(-1, torch.zeros(count, 1, 1, 2, dtype=torch.float64))
    projected = KeepKnown(clip, PICTURE, DRAWN)
    sample = SAMPLED[name]
    x_0 = sample(model, x_T, process(spec), noise=noise, guide=guide, clip=projected)
    return x_0.reshape(-1, 2)


@pytest.mark.parametrize("threshold", ["none", "static", "dynamic"])
@pytest.mark.parametrize("name", SAMPLED)
def test_the_known_part_is_the_picture(name: str, threshold: str) -> None:
    drawn = draw(name, "6", clip=make_clip(threshold), count=20)
    torch.testing.assert_close(drawn[:, 0], torch.full_like(drawn[:, 0], KNOWN), rtol=0, atol=1e-12)
    assert drawn[:, 1].std() > 0.1


@pytest.mark.parametrize("name", SAMPLED)
def test_the_known_part_of_x_t_stays_on_the_pictures_noised_path(name: str) -> None:
    """(x_t - signal x_0) / sigma is one noise for deterministic samplers, else standard normal."""
    found: list[Tensor] = []

    def spy(x_t: Tensor, time: Tensor) -> Tensor:
        a = BASE.alpha_bar[time[0]]
        found.append(((x_t - a.sqrt() * KNOWN) / (1 - a).sqrt())[..., 0].flatten())
        return network(x_t, time)

    draw(name, "12", model=spy)
    for eps in found:
        assert abs(float(eps.mean())) < 0.12 and abs(float(eps.std()) - 1) < 0.08
        if name in DETERMINISTIC:
            torch.testing.assert_close(eps, found[0], rtol=0, atol=1e-9)
    if name not in DETERMINISTIC:
        assert not torch.allclose(found[-1], found[0], atol=0.5)


def limit_of_the_projection() -> float:
    """Mean of the drawn pixel where steps are infinitely small, by Runge and Kutta.

    With y = x_t / signal and s = sigma / signal the probability flow is dy/ds = (y - x_0) / s;
    the known pixel goes straight from its noise to the picture.
    """
    alpha_bar = BASE.alpha_bar[[0, -1]]
    first, last = (((1 - alpha_bar) / alpha_bar).sqrt()).tolist()

    def slope(log_s: float, drawn: float) -> float:
        """dy / dlog s."""
        s = math.exp(log_s)
        known = KNOWN * (1 - s / last)
        y = torch.tensor([known, drawn], dtype=torch.float64)
        inverse = torch.linalg.inv(COVARIANCE + s**2 * torch.eye(2, dtype=torch.float64))
        return drawn - float((COVARIANCE @ inverse @ y)[1])

    steps, y, x = 400, 0.0, math.log(last)
    h = (math.log(first) - x) / steps
    for _ in range(steps):
        k1 = slope(x, y)
        k2 = slope(x + h / 2, y + h / 2 * k1)
        k3 = slope(x + h / 2, y + h / 2 * k2)
        k4 = slope(x + h, y + h * k3)
        x, y = x + h, y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_drawn_part_reaches_the_projections_own_limit(name: str) -> None:
    """All are linear here, so that samples from x_T and -x_T average to the mean exactly."""

    def mean(spec: str) -> float:
        x_T = noise(-1, torch.zeros(1, 1, 1, 2, dtype=torch.float64))
        pair = torch.cat([x_T, -x_T])
        clip = KeepKnown(False, PICTURE, DRAWN)
        x_0 = SAMPLERS[name](network, pair, process(spec), noise=noise, clip=clip)
        return float(x_0[..., 1].mean())

    assert mean("500") == pytest.approx(limit_of_the_projection(), abs=0.01)


def test_the_projection_leans_to_the_conditional_density_and_falls_short_of_it() -> None:
    """What it costs not to resample: about half of the way to the mean, more with fresh noise.

    The network sees the known part under noise only, and is sure of it too late.
    """
    conditional = 0.8 * KNOWN
    flow = limit_of_the_projection() / conditional
    ancestral = float(draw("ddpm", "200", count=4000)[:, 1].mean()) / conditional
    assert 0.4 < flow < 0.5 < ancestral < 0.7


def blended(name: str, clip: Clip, share: float, gradient: float | None) -> Tensor:
    """A pixel that is drawn by ``share`` and one that is drawn wholly; the network says -0.2."""
    drawn = torch.tensor([share, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    x_T = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    answer = torch.full_like(x_T, -0.2)
    known = KeepKnown(clip, torch.full_like(DRAWN, 0.6), drawn)
    guide = None if gradient is None else lambda x_t, t: torch.full_like(x_t, gradient)
    sample = SAMPLED[name]
    x_0 = sample(lambda x, t: answer, x_T, process("5"), noise=noise, guide=guide, clip=known)
    return x_0.flatten()


@pytest.mark.parametrize("threshold", ["none", "static", "dynamic"])
@pytest.mark.parametrize("gradient", [None, 0.0])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_soft_edge_blends(name: str, gradient: float | None, threshold: str) -> None:
    """Once, beside a guide that has nothing to say too."""
    found = blended(name, make_clip(threshold), 0.25, gradient)
    expected = torch.tensor([0.75 * 0.6 - 0.25 * 0.2, -0.2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_guide_leads_a_soft_edge_by_its_share(name: str) -> None:
    """Everything is linear here, without a threshold."""
    moved = blended(name, False, 0.25, 0.3) - blended(name, False, 0.25, None)
    assert float(moved[0]) == pytest.approx(0.25 * float(moved[1])) and float(moved[1]) > 1e-6


@pytest.mark.parametrize("name", [name for name in SAMPLED if name != "ddpm"])
def test_a_soft_edge_keeps_the_pictures_share_however_strong_the_guide(name: str) -> None:
    """The estimate is clipped before it is blended; DDPM leads x_{t-1} after both."""
    found = blended(name, True, 0.25, 1e6)
    expected = torch.tensor([0.75 * 0.6 + 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def constant_guide(known: float) -> Callable:
    """Leads the known pixel by ``known`` and the drawn one by 50."""
    gradient = torch.tensor([known, 50.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    return lambda x_t, t: gradient


@pytest.mark.parametrize("name", SAMPLED)
def test_a_guide_leads_the_drawn_part_alone(name: str) -> None:
    plain, led = draw(name, "40"), draw(name, "40", guide=constant_guide(50.0))
    torch.testing.assert_close(led[:, 0], plain[:, 0], rtol=0, atol=1e-12)
    assert float((led - plain)[:, 1].min()) > 0


@pytest.mark.parametrize("threshold", ["none", "static", "dynamic"])
@pytest.mark.parametrize("name", SAMPLED)
def test_what_a_guide_says_of_the_known_part_is_not_heard(name: str, threshold: str) -> None:
    """Not even by the drawn part, through a threshold that measures the whole picture."""
    clip = make_clip(threshold)
    one, other = (draw(name, "6", clip=clip, guide=constant_guide(g)) for g in (0.0, 1e6))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("strength", "taken"), [(1.0, 10), (0.95, 10), (0.94, 9), (0.5, 5), (0.25, 3), (0.001, 1)]
)
def test_strength_is_a_share_of_the_steps(strength: float, taken: int) -> None:
    whole = process("10")
    part = first_steps(whole, strength)
    assert part.num_steps == taken
    for name in ("alpha_bar", "betas", "timestep_map", "posterior_variance"):
        kept, full = getattr(part.schedule, name), getattr(whole.schedule, name)[:taken]
        assert torch.equal(kept, full)
    assert (part is whole) == (taken == 10)


def test_noise_on_the_sphere_stays_standard_normal() -> None:
    one, other = (noise(step, torch.zeros(4, 100, 100)) for step in (1, 2))
    shares = torch.tensor([0.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    mixed = on_sphere(one, other, shares)
    assert mixed.dtype == one.dtype
    assert torch.equal(mixed[0], one[0]) and torch.equal(mixed[1], other[1])
    for row, share in zip(mixed[2:], shares[2:].tolist(), strict=True):
        kept = math.cos(share * math.pi / 2)
        index = 2 if share == 0.5 else 3
        assert float(row.var()) == pytest.approx(1, abs=0.03)
        assert float((row * one[index]).mean()) == pytest.approx(kept, abs=0.03)
    assert torch.equal(on_sphere(one, other, 0.2)[3], mixed[3])
