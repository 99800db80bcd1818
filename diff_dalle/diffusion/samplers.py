"""Samplers: from noise to images. One function a sampler, one line a sampler in `SAMPLERS`.

All share one contract (`Sampler`). A sampler sees a callable, never a network class, and draws no
random number itself: ``noise`` is asked for each step's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion
from diff_dalle.diffusion.guidance import Guide, Model, shift_mean, shift_score

Noise = Callable[[int, Tensor], Tensor]
"""(step index t, x_t [B,C,H,W]) -> standard normal numbers like x_t."""

Callback = Callable[[int, Tensor], None]
"""(steps done: 1, 2, ..., T; estimate of x_0 [B,C,H,W]) -> nothing."""


class Sampler(Protocol):
    """The contract of every sampler.

    Args:
        model: the network, see `guidance.Model`.
        x_T: [B,C,H,W] standard normal noise.
        diffusion: the process, respaced to the steps that are to be taken.
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


class Step(Protocol):
    """One step of a sampler: x_{t-1} and the estimate of x_0, each [B,C,H,W]."""

    def __call__(
        self,
        diffusion: GaussianDiffusion,
        model_output: Tensor,
        x_t: Tensor,
        t: Tensor,
        z: Tensor,
        *,
        gradient: Tensor | None = None,
        clip: Clip = True,
    ) -> tuple[Tensor, Tensor]:
        """Take the step; ``z`` is fresh noise, 0 at the last step."""
        ...


def sample_ddpm(
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
    """Ancestral sampling (Ho et al. 2020, algorithm 2). See `Sampler`."""
    return _descend(
        ddpm_step, model, x_T, diffusion, noise=noise, guide=guide, clip=clip, callback=callback
    )


def ddpm_step(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    z: Tensor,
    *,
    gradient: Tensor | None = None,
    clip: Clip = True,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} = mean + Sigma g + sqrt(Sigma) z, and the estimate of x_0; no noise at t = 0.

    Ho et al. 2020, algorithm 2, line 4; guided by Dhariwal and Nichol 2021, algorithm 1.
    """
    posterior = diffusion.posterior(model_output, x_t, t, clip=clip)
    if gradient is not None:
        posterior = shift_mean(posterior, gradient)
    std = torch.exp(0.5 * posterior.log_var) * _after_first(t, x_t)
    return posterior.mean + std * z, posterior.x_0


def sample_ddim(
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
    """Implicit sampling (Song et al. 2021, eq. 12). See `Sampler`.

    ``eta`` 0 is deterministic, 1 adds as much noise as ancestral sampling.
    """
    return _descend(
        partial(ddim_step, eta=eta),
        model,
        x_T,
        diffusion,
        noise=noise if eta > 0 else None,
        guide=guide,
        clip=clip,
        callback=callback,
    )


def ddim_step(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    z: Tensor,
    *,
    eta: float = 0.0,
    gradient: Tensor | None = None,
    clip: Clip = True,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} of Song et al. 2021, eq. 12, and the estimate of x_0.

    Guided by Dhariwal and Nichol 2021, algorithm 2. No noise at t = 0.
    """
    posterior = diffusion.posterior(model_output, x_t, t, clip=clip)
    if gradient is not None:
        posterior = shift_score(diffusion, posterior, x_t, t, gradient)
    x_0 = posterior.x_0
    eps = diffusion.eps_from_x0(x_0, x_t, t)
    std = eta * diffusion.at("posterior_std", t, x_t)  # eq. 16, multiplied out; 0 at t = 0
    direction = torch.sqrt(diffusion.at("sigma_prev", t, x_t) ** 2 - std**2) * eps
    return diffusion.at("signal_prev", t, x_t) * x_0 + direction + std * z, x_0


@torch.no_grad()
def invert_ddim(
    model: Model,
    x_0: Tensor,
    diffusion: GaussianDiffusion,
    *,
    clip: Clip = True,
    callback: Callback | None = None,
) -> Tensor:
    """From an image to the noise that `sample_ddim` (eta 0) turns into it.

    The deterministic step run backwards (Song et al. 2021, section 4.3), exact as steps grow:
    each step takes eps at the level where it starts, one step below where sampling takes it.
    From the image itself to level 0 the network can only be asked about level 0.

    Returns:
        x_T, [B,C,H,W], at the level of the last step.
    """
    x = x_0
    for step in range(diffusion.num_steps):
        t = torch.full((len(x),), max(step - 1, 0), device=x.device)
        output = model(diffusion.model_input(x, t), diffusion.model_time(t))
        if step == 0:
            estimate = diffusion.posterior(output, x, t, clip=clip).x_0
            x = diffusion.add_noise(x, t, diffusion.eps_from_x0(estimate, x, t))
        else:
            x, estimate = ddim_inversion_step(diffusion, output, x, t, clip=clip)
        if callback:
            callback(step + 1, estimate)
    return x


def ddim_inversion_step(
    diffusion: GaussianDiffusion, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip = True
) -> tuple[Tensor, Tensor]:
    """x_{t+1} = sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next) eps, and the estimate x_0."""
    x_0 = diffusion.posterior(model_output, x_t, t, clip=clip).x_0
    eps = diffusion.eps_from_x0(x_0, x_t, t)
    return diffusion.at("signal_next", t, x_t) * x_0 + diffusion.at("sigma_next", t, x_t) * eps, x_0


@torch.no_grad()
def _descend(
    step: Step,
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise | None,
    guide: Guide | None,
    clip: Clip,
    callback: Callback | None,
) -> Tensor:
    """Every step of the process, from the last to step 0; without ``noise`` none is drawn."""
    x = x_T
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        output = model(diffusion.model_input(x, t), diffusion.model_time(t))
        gradient = guide(x, t) if guide else None
        z = noise(i, x) if noise and i > 0 else torch.zeros_like(x)
        x, x_0 = step(diffusion, output, x, t, z, gradient=gradient, clip=clip)
        if callback:
            callback(diffusion.num_steps - i, x_0)
    return x


def _after_first(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0 and 0 where t = 0, [B,1,1,1]."""
    return (t > 0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


SAMPLERS: dict[str, Sampler] = {"ddpm": sample_ddpm, "ddim": sample_ddim}
