"""Samplers of second order: a better estimate of x_0 for each step, from two of the network's.

Between two steps the probability flow can be solved exactly but for the estimate of x_0, which
changes on the way (Lu et al. 2022, DPM-Solver++, eq. 9). Each sampler here says which x_0 stands
for the whole way; `flow_step` then goes there. h is the way in half log-SNR, `Schedule.h`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion
from diff_dalle.diffusion.guidance import Guide, Model
from diff_dalle.diffusion.samplers.contract import Callback, Noise, ask_x0, flow_step


def sample_dpmpp_2m(
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    guide: Guide | None = None,
    clip: Clip = True,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): one network call a step. See `Sampler`."""

    def advance(i: int, t: Tensor, x_0: Tensor, x_t: Tensor) -> Tensor:
        return flow_step(diffusion, x_0, x_t, t)

    return _extrapolating(advance, model, x_T, diffusion, guide, clip, callback)


def sample_dpmpp_2m_sde(
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    guide: Guide | None = None,
    clip: Clip = True,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(2M) on the reverse SDE (Lu et al. 2022, section 5.2). See `Sampler`.

    Solved for an x_0 that stays, the SDE is q(x_{t-1} | x_t, x_0), as in ancestral sampling.
    """

    def advance(i: int, t: Tensor, x_0: Tensor, x_t: Tensor) -> Tensor:
        mean = diffusion.q_posterior(x_0, x_t, t).mean
        return mean + diffusion.at("posterior_std", t, x_t) * noise(i, x_t) if i > 0 else mean

    return _extrapolating(advance, model, x_T, diffusion, guide, clip, callback)


@torch.no_grad()
def _extrapolating(
    advance: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    guide: Guide | None,
    clip: Clip,
    callback: Callback | None,
) -> Tensor:
    """Every step by ``advance`` (i, t, x_0, x_t), towards the extrapolated x_0."""
    x, before = x_T, None
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        x_0 = ask_x0(model, x, diffusion, t, guide=guide, clip=clip)
        x = advance(i, t, _halfway(diffusion, i, x_0, before), x)
        before = x_0
        if callback:
            callback(diffusion.num_steps - i, x_0)
    return x


def _halfway(diffusion: GaussianDiffusion, i: int, x_0: Tensor, before: Tensor | None) -> Tensor:
    """x_0 halfway to step i - 1, on the line through the estimates at steps i and i + 1.

    First order at the first step, which knows one estimate, and at the last: to alpha_bar 1 it
    is infinitely far. The line is followed no further than it was measured: where steps grow
    towards the image, x_0 has nearly come to rest, and the whole line would lead past it.
    """
    if before is None or i == 0:
        return x_0
    ratio = float(diffusion.schedule.h[i] / diffusion.schedule.h[i + 1])
    return x_0 + 0.5 * min(ratio, 1.0) * (x_0 - before)


@torch.no_grad()
def sample_unipc(
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    guide: Guide | None = None,
    clip: Clip = True,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023): one network call a step. See `Sampler`.

    The estimate at the end of a step first corrects that step, then predicts the next.
    """
    x, start = x_T, x_T  # where this step starts, and where the one before it did
    estimates: list[Tensor] = []  # of the last two steps, newest first
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        x_0 = ask_x0(model, x, diffusion, t, guide=guide, clip=clip)
        if estimates:
            corrected = _corrected(diffusion, i + 1, x_0, estimates)
            x = flow_step(diffusion, corrected, start, t + 1)
        before = estimates[0] if estimates else None
        start, x = x, flow_step(diffusion, _halfway(diffusion, i, x_0, before), x, t)
        estimates = [x_0, *estimates[:1]]
        if callback:
            callback(diffusion.num_steps - i, x_0)
    return x


def _corrected(
    diffusion: GaussianDiffusion, i: int, after: Tensor, estimates: list[Tensor]
) -> Tensor:
    """x_0 for the step from i, now that the estimate ``after`` it is known (Zhao et al., eq. 3).

    The weights solve the paper's eq. 5: they are exact for an x_0 that is a parabola in log-SNR.
    Where ``estimates`` holds one alone, this is UniC-1 as published and in diffusers, with a half:
    a line would have 1 / (1 - e^-h) - 1 / h, which is a half for small steps.
    """
    here = estimates[0]
    if len(estimates) == 1:
        return here + 0.5 * (after - here)
    h = float(diffusion.schedule.h[i])
    ratio = float(diffusion.schedule.h[i] / diffusion.schedule.h[i + 1])
    step = math.expm1(-h)
    first = (1 + step / h) / -step
    second = (first * step / h + 0.5) * -2 / step
    weight = (first - second) * ratio / (1 + ratio)
    return here + weight * ratio * (here - estimates[1]) + (first - weight) * (after - here)


@torch.no_grad()
def sample_heun(
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    guide: Guide | None = None,
    clip: Clip = True,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Heun's method on the probability flow (Karras et al. 2022, algorithm 1). See `Sampler`.

    Two network calls a step, but one at the last: 2 T - 1. The mean of eps at both ends of a step
    is `flow_step` with a share e^h / 2 of the estimate at its end. Steps beyond h = log 2 take
    that estimate alone: a larger share would amplify what the two estimates differ by.
    """
    x = x_T
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        x_0 = ask_x0(model, x, diffusion, t, guide=guide, clip=clip)
        end = flow_step(diffusion, x_0, x, t)
        if i > 0:
            at_end = ask_x0(model, end, diffusion, t - 1, guide=guide, clip=clip)
            share = min(0.5 * math.exp(float(diffusion.schedule.h[i])), 1.0)
            end = flow_step(diffusion, x_0 + share * (at_end - x_0), x, t)
        x = end
        if callback:
            callback(diffusion.num_steps - i, x_0)
    return x
