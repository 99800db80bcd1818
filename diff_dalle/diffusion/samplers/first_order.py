"""Samplers of first order: ancestral (DDPM) and implicit (DDIM), and DDIM run backwards."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diff_dalle.diffusion.editing import KeepKnown
from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion, per_sample
from diff_dalle.diffusion.guidance import Guide, Model, shift_mean
from diff_dalle.diffusion.samplers.contract import Callback, Noise, ask, estimate_x0, flow_step


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
        # This comes after the estimate that keeps the known part, so it heeds the mask itself.
        share = clip.drawn if isinstance(clip, KeepKnown) else 1
        posterior = shift_mean(posterior, share * gradient)
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
    x_0 = estimate_x0(diffusion, model_output, x_t, t, gradient=gradient, clip=clip)
    std = eta * diffusion.at("posterior_std", t, x_t)  # eq. 16, multiplied out; 0 at t = 0
    return flow_step(diffusion, x_0, x_t, t, std) + std * z, x_0


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
    for step, asked in enumerate(inversion_steps(diffusion)):
        t = torch.full((len(x),), asked, device=x.device)
        output = ask(model, diffusion, x, t)
        if step == 0:
            estimate = diffusion.predict_x0(output, x, t, clip=clip)
            x = diffusion.add_noise(x, t, diffusion.eps_from_x0(estimate, x, t))
        else:
            x, estimate = ddim_inversion_step(diffusion, output, x, t, clip=clip)
        if callback:
            callback(step + 1, estimate)
    return x


def inversion_steps(diffusion: GaussianDiffusion) -> list[int]:
    """The steps at which `invert_ddim` asks the network, in order."""
    return [max(step - 1, 0) for step in range(diffusion.num_steps)]


def ddim_inversion_step(
    diffusion: GaussianDiffusion, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip = True
) -> tuple[Tensor, Tensor]:
    """x_{t+1} = sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next) eps, and the estimate x_0."""
    x_0 = diffusion.predict_x0(model_output, x_t, t, clip=clip)
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
        output = ask(model, diffusion, x, t)
        gradient = guide(x, t) if guide else None
        z = noise(i, x) if noise and i > 0 else torch.zeros_like(x)
        x, x_0 = step(diffusion, output, x, t, z, gradient=gradient, clip=clip)
        if callback:
            callback(diffusion.num_steps - i, x_0)
    return x


def _after_first(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0 and 0 where t = 0, [B,1,1,1]."""
    return per_sample((t > 0).to(x.dtype), x)
