"""Samplers: from noise to images. One function a sampler, one line a sampler in `SAMPLERS`.

All share one contract (`Sampler`). A sampler sees a callable, never a network class, and draws no
random number itself: ``noise`` is asked for each step's.
"""

from __future__ import annotations

from diff_dalle.diffusion.samplers.contract import Callback, Noise, Sampler
from diff_dalle.diffusion.samplers.first_order import (
    ddim_inversion_step,
    ddim_step,
    ddpm_step,
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

__all__ = [
    "SAMPLERS",
    "Callback",
    "Noise",
    "Sampler",
    "ddim_inversion_step",
    "ddim_step",
    "ddpm_step",
    "invert_ddim",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_heun",
    "sample_unipc",
]
