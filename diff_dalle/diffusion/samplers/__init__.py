"""Samplers: from noise to images. One function a sampler, one line a sampler in `SAMPLERS`.

All share one contract (`Sampler`). A sampler sees a callable, never a network class, and draws no
random number itself: ``noise`` is asked for each step's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.samplers.contract import Callback, Noise, Sampler
from diff_dalle.diffusion.samplers.first_order import (
    ddim_inversion_step,
    ddim_step,
    ddpm_step,
    inversion_steps,
    invert_ddim,
    sample_ddim,
    sample_ddpm,
)
from diff_dalle.diffusion.samplers.second_order import (
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_heun,
    sample_unipc,
)

SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
    "heun": sample_heun,
}


def asked_steps(sampler: str, diffusion: GaussianDiffusion) -> list[int]:
    """The steps at which a sampler asks the network and its guide, in order, one entry each time.

    It is found out by sampling one number, so it holds for any sampler.

    >>> from diff_dalle.diffusion.schedule import Schedule
    >>> asked_steps("heun", GaussianDiffusion(Schedule.make("cosine", 1000).respace("3")))
    [2, 1, 1, 0, 0]
    """
    asked: list[int] = []
    channels = 2 if diffusion.variance == "learned_range" else 1

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        return torch.zeros(1, channels, 1, 1)

    def guide(x_t: Tensor, t: Tensor) -> None:
        asked.append(int(t))

    zero = torch.zeros(1, 1, 1, 1)
    SAMPLERS[sampler](model, zero, diffusion, noise=lambda step, x: zero, guide=guide)
    return asked


__all__ = [
    "SAMPLERS",
    "Callback",
    "Noise",
    "Sampler",
    "asked_steps",
    "ddim_inversion_step",
    "ddim_step",
    "ddpm_step",
    "inversion_steps",
    "invert_ddim",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_heun",
    "sample_unipc",
]
