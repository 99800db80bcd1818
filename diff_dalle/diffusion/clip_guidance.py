"""Guidance by a CLIP trained on noised images: the gradient of how well text and image agree.

Notation: B batch, E width of the features, K captions of a contrast set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion, per_sample
from diff_dalle.diffusion.guidance import Guide
from diff_dalle.diffusion.strength import ScaleAt, everywhere

LogProbability = Callable[[Tensor], Tensor]
"""Image features [B,E] -> log p(text | image) [B], each row by itself."""


def similarity(text_features: Tensor, logit_scale: float) -> LogProbability:
    """logit_scale * cos(image, text): log p(text | image) without its normaliser.

    It stands in for the probability as in GLIDE (Nichol et al. 2022, section 2.4). No set of
    other captions is needed, and nothing tells the caption from them.

    Args:
        text_features: [B,E].
        logit_scale: the factor that the CLIP puts on its cosines.
    """
    return lambda features: logit_scale * F.cosine_similarity(features, text_features, dim=-1)


def log_softmax_in_set(
    text_features: Tensor, logit_scale: float, others: Tensor, used: Tensor
) -> LogProbability:
    """log p(text | image) among the text and a set of other captions.

    logit_scale cos(image, text) - log sum exp logit_scale cos(image, .) over {text} and those of
    ``others`` that are ``used``: the CLIP's training loss with that set for its batch (Radford
    et al. 2021). Its gradient leads to what the text alone says and the others do not.

    Args:
        text_features: [B,E].
        logit_scale: the factor that the CLIP puts on its cosines.
        others: [K,E].
        used: bool [B,K], False where a caption of the set is the sample's own.
    """
    others = F.normalize(others, dim=-1)

    def log_probability(features: Tensor) -> Tensor:
        own = similarity(text_features, logit_scale)(features)  # [B]
        # In full precision: logit_scale multiplies a cosine by up to 100, and halves hold 3 digits.
        with torch.autocast(features.device.type, enabled=False):
            # Row by row: a product of matrices rounds differently for another batch size.
            cosines = torch.stack([others @ row for row in F.normalize(features, dim=-1)])  # [B,K]
        logits = (logit_scale * cosines).masked_fill(~used, -torch.inf)
        return own - torch.logsumexp(torch.cat([own[:, None], logits], dim=1), dim=1)

    return log_probability


def clip_gradient(
    encode_image: Callable[[Tensor, Tensor], Tensor],
    log_probability: LogProbability,
    scale: float | ScaleAt,
    to_model_time: Callable[[Tensor], Tensor],
) -> Guide:
    """Gradient of s log p(text | x_t) by x_t: uphill, towards the text.

    Args:
        encode_image: (x_t, time) -> features [B,E], differentiable by x_t. Not asked at steps
            whose scale is 0.
        log_probability: of the features, up to a constant.
        scale: s, or what gives it for t; negative leads away.
        to_model_time: from the sampled process's t [B] to the time that the encoder is told.
    """
    scale_at = scale if callable(scale) else everywhere(scale)

    def guide(x_t: Tensor, t: Tensor) -> Tensor | None:
        scales = scale_at(t)  # [B]
        if not bool(scales.any()):
            return None
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_(True)
            total = log_probability(encode_image(x, to_model_time(t))).sum()
            (gradient,) = torch.autograd.grad(total, x)
        strength = scales.to(x_t.dtype).to(x_t.device, non_blocking=True)
        return per_sample(strength, x_t) * gradient

    return guide


def time_of_other_process(
    sampled: GaussianDiffusion, trained: GaussianDiffusion
) -> Callable[[Tensor], Tensor]:
    """What to tell a network trained on another process about a step of the sampled one.

    For `clip_gradient` with a CLIP of another schedule: it is asked at the step of its own
    process whose noise level lies nearest. For the process that ``sampled`` was respaced from,
    this is ``sampled.model_time``.

    Args:
        sampled: the process that is sampled, respaced or not.
        trained: the whole process that the network was trained on.
    Returns:
        From t int64 [B] in ``sampled`` to what the network is told, [B].
    """
    times = trained.model_time(trained.nearest_step(sampled.alpha_bar))  # [T]
    on = functools.cache(times.to)  # one copy a device, not one a step
    return lambda t: on(t.device)[t]
