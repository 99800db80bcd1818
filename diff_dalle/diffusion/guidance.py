"""Guidance: drawing samples towards a condition.

Two ways that add up: classifier-free guidance changes what the network predicts, a gradient
(of a classifier or a CLIP trained on noised images) changes the step that is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion, Posterior

Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], what `GaussianDiffusion.model_time` gave [B]) -> output [B,C or 2C,H,W]."""

Guide = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], t int64 [B] in the sampled process) -> gradient of log p(y | x_t), like x_t."""


def shift_mean(posterior: Posterior, gradient: Tensor) -> Posterior:
    """mean + Sigma g (Dhariwal and Nichol 2021, algorithm 1), for samplers that draw.

    Args:
        posterior: of the unguided model.
        gradient: [B,C,H,W], g = gradient of log p(y | x_t) by x_t, scaled as wished.
    """
    return replace(posterior, mean=posterior.mean + posterior.log_var.exp() * gradient)


def shift_score(
    diffusion: GaussianDiffusion, posterior: Posterior, x_t: Tensor, t: Tensor, gradient: Tensor
) -> Posterior:
    """eps - sqrt(1 - alpha_bar) g (Dhariwal and Nichol 2021, algorithm 2), for any sampler.

    Said of x_0: it grows by (1 - alpha_bar) / sqrt(alpha_bar) g. Where x_t is noise alone it
    tells no condition from another, and g is left out.

    Args:
        diffusion: the process.
        posterior: of the unguided model.
        x_t: [B,C,H,W].
        t: int64 [B].
        gradient: as in `shift_mean`.
    Returns:
        The posterior of the guided eps. Its estimate of x_0 is not clipped again.
    """
    x_0 = posterior.x_0 + diffusion.at("x_0_per_score", t, x_t) * gradient
    return replace(posterior, mean=diffusion.q_posterior(x_0, x_t, t).mean, x_0=x_0)


def classifier_free(model_both: Model, scale: float, learned_variance: bool) -> Model:
    """The model eps_u + s (eps_c - eps_u) (Ho and Salimans 2022, eq. 6, with s = 1 + w).

    The same formula serves every prediction: at one x_t all are affine in each other.

    Args:
        model_both: takes [2B,C,H,W] and [2B]; told the captions in the first half and the null
            caption in the second.
        scale: s; 1 is the conditional model, 0 the unconditional one.
        learned_variance: whether outputs are [2B,2C,H,W]; the variance is the conditional's.
    """

    def guided(x_t: Tensor, time: Tensor) -> Tensor:
        both = model_both(torch.cat([x_t, x_t]), torch.cat([time, time]))  # [2B,C',H,W]
        cond, uncond = both.chunk(2)
        if not learned_variance:
            return uncond + scale * (cond - uncond)
        cond_mean, variance = cond.chunk(2, dim=1)
        uncond_mean, _ = uncond.chunk(2, dim=1)
        return torch.cat([uncond_mean + scale * (cond_mean - uncond_mean), variance], dim=1)

    return guided


def similarity_gradient(
    encode_image: Callable[[Tensor, Tensor], Tensor],
    text_features: Tensor,
    scale: float,
    to_model_time: Callable[[Tensor], Tensor],
) -> Guide:
    """Gradient of scale * cos(f(x_t, t), text) by x_t: uphill, towards the text.

    A CLIP's similarity stands in for log p(text | x_t) (Nichol et al. 2022, GLIDE, section 2.4).

    Args:
        encode_image: (x_t, time) -> features [B,E], differentiable by x_t.
        text_features: [B,E].
        scale: the strength; negative leads away.
        to_model_time: from the sampled process's t [B] to the time that the encoder is told.
    """

    def guide(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_(True)
            features = encode_image(x, to_model_time(t))  # [B,E]
            similarity = F.cosine_similarity(features, text_features, dim=-1)  # [B]
            (gradient,) = torch.autograd.grad(similarity.sum(), x)
        return scale * gradient

    return guide


def time_of_other_process(
    sampled: GaussianDiffusion, trained: GaussianDiffusion
) -> Callable[[Tensor], Tensor]:
    """What to tell a network trained on another process about a step of the sampled one.

    For `similarity_gradient` with a CLIP of another schedule: it is asked at the step of its own
    process whose noise level lies nearest. For the process that ``sampled`` was respaced from,
    this is ``sampled.model_time``.

    Args:
        sampled: the process that is sampled, respaced or not.
        trained: the whole process that the network was trained on.
    Returns:
        From t int64 [B] in ``sampled`` to what the network is told, [B].
    """
    times = trained.model_time(trained.nearest_step(sampled.alpha_bar))  # [T]
    return lambda t: times.to(t.device)[t]
