"""Editing as parts of what a sampler takes: its clip, its guide, its first step, its noise.

No sampler knows of it, so all of it works with every one of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion, apply_clip, per_sample
from diff_dalle.diffusion.guidance import Guide


def keep_known(clip: Clip, picture: Tensor, drawn: Tensor) -> Clip:
    """A clip that also puts the known part of a picture into each estimate of x_0.

    x_0 <- (1 - m) picture + m x_0, m = ``drawn``: the projection of Wang et al. 2023 for a
    mask. Lugmayr et al. 2022 replace the same part of x_t instead; here the sampler itself takes
    it along the picture's own noised path, since its x_0 stays.

    Args:
        clip: of the whole estimate, before the known part is put back.
        picture: [B,C,H,W].
        drawn: m in [0, 1], [B,1,H,W]: 0 where the picture is known, 1 where it is drawn.
    """
    return lambda x_0: torch.lerp(picture, apply_clip(x_0, clip), drawn)


def guide_drawn(guide: Guide, drawn: Tensor) -> Guide:
    """A guide that leads the drawn part alone.

    Ancestral sampling moves x_{t-1} by the gradient after the estimate is clipped, so what is
    known has to be left out of the gradient too.

    Args:
        guide: of the whole picture.
        drawn: m of `keep_known`, [B,1,H,W].
    """

    def masked(x_t: Tensor, t: Tensor) -> Tensor | None:
        gradient = guide(x_t, t)
        return None if gradient is None else drawn * gradient

    return masked


def first_steps(diffusion: GaussianDiffusion, strength: float) -> GaussianDiffusion:
    """The part of a process that sampling takes from a noised picture on (Meng et al. 2022).

    Args:
        diffusion: the process, respaced.
        strength: in (0, 1], the share of its T steps that are taken, rounded, at least one.
            Steps keep their numbers; 1 is the process itself.
    """
    count = max(1, math.floor(strength * diffusion.num_steps + 0.5))
    return diffusion if count == diffusion.num_steps else diffusion.keep(range(count))


def on_sphere(one: Tensor, other: Tensor, share: Tensor | float) -> Tensor:
    """cos(a) one + sin(a) other with a = share * pi / 2.

    Of independent standard normal numbers the result is standard normal too; a straight line
    between them would pass where the variance is a half. Both ends are exact.

    Args:
        one: [B,...].
        other: like ``one``.
        share: in [0, 1], [B] or one for all.
    """
    shares = torch.as_tensor(share, dtype=torch.float64, device="cpu").expand(len(one))
    angles = torch.stack([1 - shares, shares]) * (math.pi / 2)  # sin: cos is not 0 at pi / 2
    of_one, of_other = angles.sin().to(one.dtype).to(one.device)  # [B] each
    return per_sample(of_one, one) * one + per_sample(of_other, one) * other
