"""Everything random about a training sample, drawn on the device from ``Batch.seed``.

Each draw reads a stream of its own, so adding one never moves another, and a sample meets the
same draws in any batch, microbatch, rank or resumed run. Numbers come as float32; the task
casts them to the model's dtype. B batch; ``seed`` is int64 [B] throughout.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from diff_dalle import keyed_noise


class Stream(IntEnum):
    """Which independent sequence of a sample's seed feeds which draw."""

    TIMESTEP = 0
    NOISE = 1
    CAPTION_DROP = 2
    BLUR_CHOICE = 3
    BLUR_SIGMA = 4
    AUG_LEVEL = 5
    AUG_NOISE = 6
    CROP_ROW = 7
    CROP_COLUMN = 8
    NOISE_OFFSET = 9
    PERTURBATION = 10
    HELD_OUT = 100  # and upwards, two streams a timestep quartile
    LIKELIHOOD = 1000  # and upwards, one stream a step


def timestep(seed: Tensor) -> Tensor:
    """f32 [B] in (0, 1), for the inverse distribution function of a timestep sampler."""
    return keyed_noise.uniform(seed, (), Stream.TIMESTEP)


def noise(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """eps: standard normal f32 [B, *shape]."""
    return keyed_noise.normal(seed, shape, Stream.NOISE)


def noise_offset(seed: Tensor, channels: int) -> Tensor:
    """Standard normal f32 [B,C,1,1]: one number for a whole channel of a sample's noise."""
    return keyed_noise.normal(seed, (channels, 1, 1), Stream.NOISE_OFFSET)


def perturbation(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """xi: standard normal f32 [B, *shape], for noise that the network is not asked for."""
    return keyed_noise.normal(seed, shape, Stream.PERTURBATION)


def held_out(
    seed: Tensor, shape: tuple[int, ...], quartile: int, steps: int
) -> tuple[Tensor, Tensor]:
    """A held-out sample's fixed (t, eps) in one of four quarters of ``steps``.

    Returns:
        int64 [B] in [quartile, quartile + 1) · steps / 4, and standard normal f32 [B, *shape].
    """
    first = Stream.HELD_OUT + 2 * quartile
    t = ((quartile + keyed_noise.uniform(seed, (), first)) * steps / 4).long()
    # quartile + r may round up to the next quarter.
    last = max(0, -(-(quartile + 1) * steps // 4) - 1)
    return t.clamp(max=last), keyed_noise.normal(seed, shape, first + 1)


def likelihood(seed: Tensor, shape: tuple[int, ...], step: int) -> Tensor:
    """eps of one step of the base process, for the variational bound: f32 [B, *shape]."""
    return keyed_noise.normal(seed, shape, Stream.LIKELIHOOD + step)


def caption_drop(seed: Tensor, probability: float) -> Tensor:
    """bool [B]: which captions the null embedding replaces (Ho and Salimans 2022)."""
    return keyed_noise.uniform(seed, (), Stream.CAPTION_DROP) < probability


def blur_sigma(seed: Tensor, probability: float, sigma: tuple[float, float]) -> Tensor:
    """f32 [B] in low-resolution pixels: U(sigma) with the given probability, else 0 (no blur)."""
    low, high = sigma
    chosen = keyed_noise.uniform(seed, (), Stream.BLUR_CHOICE) < probability
    width = low + (high - low) * keyed_noise.uniform(seed, (), Stream.BLUR_SIGMA)
    return torch.where(chosen, width, torch.zeros_like(width))


def aug_level(seed: Tensor, largest: float) -> Tensor:
    """f32 [B]: the level of noise on the low-resolution input, U(0, largest)."""
    return largest * keyed_noise.uniform(seed, (), Stream.AUG_LEVEL)


def aug_noise(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal f32 [B, *shape] for the low-resolution input."""
    return keyed_noise.normal(seed, shape, Stream.AUG_NOISE)


def crop_corner(seed: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [B] each in [0, positions), of a crop's upper left corner."""
    row = keyed_noise.uniform(seed, (), Stream.CROP_ROW)
    column = keyed_noise.uniform(seed, (), Stream.CROP_COLUMN)
    last = positions - 1  # the product may round up to ``positions``
    return (row * positions).long().clamp(max=last), (column * positions).long().clamp(max=last)
