"""How likely a network makes images: the whole variational bound, in bits per dimension.

L = L_T + L_{T-1} + ... + L_0 (Ho et al. 2020, eq. 5) bounds -log p(x_0) of 8-bit images from
above. Each term is measured at one draw of x_t, as Nichol and Dhariwal (2021) do, so the sum is an
unbiased estimate of the bound. Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion
from diff_dalle.diffusion.guidance import Model
from diff_dalle.diffusion.losses import normal_kl, vb_terms_bpd
from diff_dalle.diffusion.samplers import Noise
from diff_dalle.diffusion.samplers.contract import ask


@dataclass(frozen=True)
class Bound:
    """The bound of B images and what the network did at each of T steps; float64, on the CPU.

    Attributes:
        prior_bpd: [B], what the noisiest step still knows of the image, in bits per dimension.
        vb: [B,T], the terms of the steps, in bits per dimension; column t is step t.
        xstart_mse: [B,T], squared error of the estimate of x_0.
        mse: [B,T], squared error of the noise which that estimate implies.
    """

    prior_bpd: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor

    @property
    def total_bpd(self) -> Tensor:
        """[B], the bound itself."""
        return self.vb.sum(dim=1) + self.prior_bpd


def variational_bound(
    model: Model,
    x_0: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    clip: Clip = True,
    callback: Callable[[], None] | None = None,
) -> Bound:
    """Every term of the variational bound on -log p(x_0), the noisiest step first.

    Args:
        model: the network, see `guidance.Model`; it is asked once a step.
        x_0: [B,C,H,W], 8-bit images mapped to [-1, 1].
        diffusion: the process; a respaced one is a model of its own, with its own bound.
        noise: (step of the *base* process, x_0) -> standard normal numbers like ``x_0``, so that
            a respaced process sees the same x_t as the whole one.
        clip: what happens to every estimate of x_0, see `gaussian.Clip`; it is part of the model.
        callback: called after every step.
    """
    found: list[Tensor] = []
    for step in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x_0),), step, device=x_0.device)
        eps = noise(int(diffusion.schedule.timestep_map[step]), x_0)
        x_t = diffusion.add_noise(x_0, t, eps)
        output = ask(model, diffusion, x_t, t)
        found.append(_terms(diffusion, output, x_0, x_t, t, eps, clip))
        if callback is not None:
            callback()
    # One copy at the end: a copy a step would make the host wait for the device.
    table = torch.stack(found[::-1], dim=2).cpu().double()  # [3,B,T]
    return Bound(prior_bpd(diffusion, x_0).cpu().double(), *table)


def prior_bpd(diffusion: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [B]; no network enters it."""
    last = torch.full((len(x_0),), diffusion.num_steps - 1, device=x_0.device)
    mean = diffusion.at("signal", last, x_0) * x_0
    log_var = 2 * diffusion.at("sigma", last, x_0).log()
    zero = torch.zeros_like(mean)
    nats = normal_kl(mean, log_var, zero, zero)  # [B,C,H,W]
    return nats.flatten(1).mean(dim=1) / math.log(2)


def _terms(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    eps: Tensor,
    clip: Clip,
) -> Tensor:
    """vb, xstart_mse and mse of one step, [3,B]."""
    model_output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    vb = vb_terms_bpd(diffusion, model_output, x_0, x_t, t, clip=clip)
    estimate = diffusion.predict_x0(model_output, x_t, t, clip=clip)
    implied = diffusion.eps_from_x0(estimate, x_t, t)
    errors = torch.stack([(estimate - x_0) ** 2, (implied - eps) ** 2])  # [2,B,C,H,W]
    return torch.cat([vb[None], errors.flatten(2).mean(dim=2)])
