"""A generator with its condition as a sampler sees it: a function of (x_t, time), perhaps guided.

B batch, C channels, H W pixels, L tokens, D width, T steps.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.guidance import Model, classifier_free
from diff_dalle.diffusion.strength import scale_at_time
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.models.tiles import TiledGenerator


def guided_model(
    generator: Generator | TiledGenerator,
    cond: Cond,
    negative: Cond | None,
    diffusion: GaussianDiffusion,
    scales: Tensor,
    rescale: float,
) -> Model:
    """The generator told its condition, with classifier-free guidance at the steps that have it.

    At a guided step both branches share one batch of 2B; at the others the generator is asked
    about B pictures only.

    Args:
        generator: the stage's model, perhaps asked in tiles: guidance is for whole pictures.
        cond: what it is told, for B pictures; texts are encoded here, and read once by every
            layer, since they are the same at all steps.
        negative: tokens and mask [B,L], and in ``drop`` [B] the pictures for which the null
            caption stays: what takes the null caption's place. None: nothing does.
        diffusion: the process that is sampled.
        scales: the scale of guidance at each of its steps, [T]; 1 is none, and nothing else
            will do for a generator that was trained without captions.
        rescale: see `guidance.rescaled`.
    """
    cond = generator.encode(cond)
    told = generator.remember(cond)

    def conditional(x_t: Tensor, time: Tensor) -> Tensor:
        return generator(x_t, time, told)

    if bool((scales == 1).all()):
        return conditional
    negative = None if negative is None else generator.encode(negative)
    both = generator.remember(_both_branches(cond, negative))
    return classifier_free(
        lambda x_t, time: generator(x_t, time, both),
        scale_at_time(diffusion, scales),
        learned_variance=generator.cfg.learn_sigma,
        model_cond=conditional,
        rescale=rescale,
    )


def _both_branches(cond: Cond, negative: Cond | None) -> Cond:
    """2B conditions: the first half as given, the second with another caption or none."""
    assert cond.text is not None and cond.mask is not None

    def twice(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.cat([value, value])

    kept = torch.zeros(len(cond.text), dtype=torch.bool, device=cond.text.device)  # [B]
    text, mask, drop = cond.text, cond.mask, ~kept
    if negative is not None:
        assert negative.text is not None and negative.mask is not None
        text, mask = negative.text, negative.mask
        drop = kept if negative.drop is None else negative.drop
    return dataclasses.replace(
        cond,
        tokens=None,
        text=torch.cat([cond.text, text]),
        mask=torch.cat([cond.mask, mask]),
        drop=torch.cat([kept, drop]),
        low_res=twice(cond.low_res),
        aug_level=twice(cond.aug_level),
    )
