"""Editing as parts of what a sampler takes: its clip, its guide, its first step, its noise.

All of it works with every sampler. What a guide leads is for the clip to say: samplers know of
`KeepKnown`, and ask it where there is a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion, apply_clip, per_sample


@dataclass(frozen=True)
class KeepKnown:
    """A clip that also puts the known part of a picture into each estimate of x_0.

    x_0 <- (1 - m) picture + m x_0, m = ``drawn``: the projection of Wang et al. 2023 for a
    mask. Lugmayr et al. 2022 replace the same part of x_t instead; here the sampler itself takes
    it along the picture's own noised path, since its x_0 stays.

    Done twice, grey pixels would keep m^2 of x_0, so an estimate that a gradient leads is
    only clipped first, see `samplers.contract.estimate_x0`.

    Attributes:
        clip: of the whole estimate, before the known part is put back.
        picture: [B,C,H,W].
        drawn: m in [0, 1], [B,1,H,W]: 0 where the picture is known, 1 where it is drawn.
    """

    clip: Clip
    picture: Tensor
    drawn: Tensor

    def __call__(self, x_0: Tensor) -> Tensor:
        """The estimate clipped, then blended with the picture."""
        return torch.lerp(self.picture, apply_clip(x_0, self.clip), self.drawn)

    def led(self, x_0: Tensor) -> Tensor:
        """An estimate that a gradient has led, [B,C,H,W], as ``self`` wants it.

        What is wholly known is put back before it is clipped too: where the gradient led it must
        not raise the quantile of a dynamic threshold.
        """
        return self(torch.where(self.drawn > 0, x_0, self.picture))


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
