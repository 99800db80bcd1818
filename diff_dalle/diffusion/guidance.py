"""Guidance: drawing samples towards a condition.

Two ways that add up: classifier-free guidance changes what the network predicts, a gradient
(of a classifier or a CLIP trained on noised images, `clip_guidance`) changes the step that is
taken. How strong either is at each step: `strength`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion, Posterior, per_sample
from diff_dalle.diffusion.strength import ScaleAt, everywhere

Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], what `GaussianDiffusion.model_time` gave [B]) -> output [B,C or 2C,H,W]."""

Guide = Callable[[Tensor, Tensor], Tensor | None]
"""(x_t [B,C,H,W], t int64 [B] in the sampled process) -> gradient of log p(y | x_t), like x_t;
None: no guidance at this step."""


def shift_mean(posterior: Posterior, gradient: Tensor) -> Posterior:
    """mean + Sigma g (Dhariwal and Nichol 2021, algorithm 1), for samplers that draw.

    Args:
        posterior: of the unguided model.
        gradient: [B,C,H,W], g = gradient of log p(y | x_t) by x_t, scaled as wished.
    """
    return replace(posterior, mean=posterior.mean + posterior.log_var.exp() * gradient)


def shift_score(diffusion: GaussianDiffusion, x_0: Tensor, t: Tensor, gradient: Tensor) -> Tensor:
    """x_0 of eps - sqrt(1 - alpha_bar) g (Dhariwal and Nichol 2021, algorithm 2), but bounded.

    As published x_0 moves by (1 - alpha_bar) / sqrt(alpha_bar) g, without bound where noise is
    near total. Here it moves so far at most that a step of DDIM with eta 0 moves x_{t-1} as
    `shift_mean` would. Steps that weigh x_0 more move up to two and a half times as far.

    Args:
        diffusion: the process.
        x_0: [B,C,H,W], the estimate of the unguided model.
        t: int64 [B].
        gradient: as in `shift_mean`.
    Returns:
        x_0 [B,C,H,W], not clipped again.
    """
    return x_0 + diffusion.at("bounded_reach", t, x_0) * gradient


def classifier_free(
    model_both: Model,
    scale: float | ScaleAt,
    learned_variance: bool,
    *,
    model_cond: Model | None = None,
    rescale: float = 0.0,
) -> Model:
    """The model eps_u + s (eps_c - eps_u) (Ho and Salimans 2022, eq. 6, with s = 1 + w).

    The same formula serves every prediction: at one x_t all are affine in each other.

    Args:
        model_both: takes [2B,C,H,W] and [2B]; told the captions in the first half and the null
            caption, or what a picture is to be led away from, in the second.
        scale: s, or what gives it for a time; 1 is the conditional model, 0 the unconditional
            one. See `strength` (Kynkäänniemi et al. 2024; Wang et al. 2024).
        learned_variance: whether outputs are [2B,2C,H,W]; the variance is the conditional's.
        model_cond: takes [B,C,H,W] and [B], told the captions; asked alone where s is 1. Without
            it ``model_both`` is asked there too.
        rescale: phi in [0, 1], see `rescaled`.
    """

    scale_at = scale if callable(scale) else everywhere(scale)

    def guided(x_t: Tensor, time: Tensor) -> Tensor:
        scales = scale_at(time)  # [B]
        if model_cond is not None and bool((scales == 1).all()):
            return model_cond(x_t, time)
        both = model_both(torch.cat([x_t, x_t]), torch.cat([time, time]))  # [2B,C',H,W]
        cond, uncond = both.chunk(2)
        if not learned_variance:
            return _led_away(cond, uncond, scales, rescale)
        cond_mean, variance = cond.chunk(2, dim=1)
        uncond_mean, _ = uncond.chunk(2, dim=1)
        return torch.cat([_led_away(cond_mean, uncond_mean, scales, rescale), variance], dim=1)

    return guided


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """phi x std(x_c) / std(x) + (1 - phi) x (Lin et al. 2024, eqs. 14 to 16).

    Guidance makes predictions larger, and pictures overexposed; this takes their size back. As
    published it acts on the network's own prediction (theirs was v), each sample by itself.

    Args:
        guided: x [B,C,H,W], the guided prediction.
        cond: x_c [B,C,H,W], the conditional one.
        phi: 0 leaves x as it is, 1 gives it the conditional one's standard deviation.
    """
    dims = tuple(range(1, guided.ndim))
    wanted = cond.std(dims, correction=0, keepdim=True)
    found = guided.std(dims, correction=0, keepdim=True)
    ratio = torch.where(found > 0, wanted / found, 1)  # a flat prediction has no size to take back
    return guided * (phi * ratio + 1 - phi)


def _led_away(cond: Tensor, uncond: Tensor, scales: Tensor, rescale: float) -> Tensor:
    """uncond + s (cond - uncond), perhaps `rescaled`; scales [B], the others [B,C,H,W]."""
    # Scales stay float32 beside halves, which hold three digits.
    scales = scales.to(torch.promote_types(cond.dtype, torch.float32))
    scales = scales.to(cond.device, non_blocking=True)  # nothing else would wait for the device
    guided = uncond + per_sample(scales, cond) * (cond - uncond)
    return rescaled(guided, cond, rescale) if rescale else guided
