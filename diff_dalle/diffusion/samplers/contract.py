"""What every sampler keeps to, and what all of them do alike: ask the network, step to x_{t-1}."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from diff_dalle.diffusion.editing import KeepKnown
from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion, apply_clip
from diff_dalle.diffusion.guidance import Guide, Model, shift_score

Noise = Callable[[int, Tensor], Tensor]
"""(step index t, x_t [B,C,H,W]) -> standard normal numbers like x_t."""

Callback = Callable[[int, Tensor], None]
"""(steps done: 1, 2, ..., T; estimate of x_0 [B,C,H,W]) -> nothing."""


class Sampler(Protocol):
    """The contract of every sampler.

    Args:
        model: the network, see `guidance.Model`.
        x_T: [B,C,H,W] standard normal noise.
        diffusion: the process, respaced to the steps that are to be taken. Its last step may hold
            no signal at all (alpha_bar 0), unless the network predicts eps.
        noise: fresh noise for step t; deterministic samplers do not call it.
        guide: gradient to follow, see `guidance.Guide`.
        clip: what happens to every estimate of x_0, see `gaussian.Clip`.
        callback: told of every step.
        eta: randomness from 0 to 1 of samplers that have a choice; the others do not read it.
    Returns:
        x_0, [B,C,H,W].
    """

    def __call__(
        self,
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
        """Sample."""
        ...


def ask(model: Model, diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor) -> Tensor:
    """The network's output at x_t [B,C,H,W] and step t [B]; every sampler asks here."""
    return model(diffusion.model_input(x_t, t), diffusion.model_time(t))


def estimate_x0(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    gradient: Tensor | None,
    clip: Clip,
) -> Tensor:
    """The estimate of x_0 that a step rests on: clipped, then led by the gradient.

    Clipped again where it was led: a strong gradient would take it beyond what pictures hold.
    The known part of a picture is put into it once, at the end.
    """
    if gradient is None:
        return diffusion.predict_x0(model_output, x_t, t, clip=clip)
    limit = clip.clip if isinstance(clip, KeepKnown) else clip
    x_0 = diffusion.predict_x0(model_output, x_t, t, clip=limit)
    x_0 = shift_score(diffusion, x_0, t, gradient)
    return clip.led(x_0) if isinstance(clip, KeepKnown) else apply_clip(x_0, clip)


def ask_x0(
    model: Model,
    x_t: Tensor,
    diffusion: GaussianDiffusion,
    t: Tensor,
    *,
    guide: Guide | None,
    clip: Clip,
) -> Tensor:
    """`ask` and `estimate_x0`, for samplers that need the estimate alone."""
    output = ask(model, diffusion, x_t, t)
    gradient = guide(x_t, t) if guide else None
    return estimate_x0(diffusion, output, x_t, t, gradient=gradient, clip=clip)


def flow_step(
    diffusion: GaussianDiffusion, x_0: Tensor, x_t: Tensor, t: Tensor, std: Tensor | float = 0.0
) -> Tensor:
    """sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - std^2) eps: towards x_0.

    Song et al. 2021, eq. 12, without its noise, of which ``std`` is the size. With ``std`` 0 and
    an x_0 that stays the same all along the step this is the exact probability flow, so samplers
    of higher order take this step too, towards a better x_0.
    """
    eps = diffusion.eps_from_x0(x_0, x_t, t)
    direction = torch.sqrt(diffusion.at("sigma_prev", t, x_t) ** 2 - std**2) * eps
    return diffusion.at("signal_prev", t, x_t) * x_0 + direction
