"""Thresholding: how far an estimate of x_0 may reach, as callables for `gaussian.Clip`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, per_sample

THRESHOLDS = ("none", "static", "dynamic")


def make_clip(threshold: str, percentile: float = 0.995, maximum: float = math.inf) -> Clip:
    """The clip that a name of `THRESHOLDS` means; the others are for "dynamic" alone."""
    if threshold == "dynamic":
        return dynamic_threshold(percentile, maximum)
    return threshold == "static"


def dynamic_threshold(percentile: float, maximum: float) -> Callable[[Tensor], Tensor]:
    """Clip each sample to +-s and divide by s, s = its quantile of |x_0| (Saharia et al. 2022).

    Strong classifier-free guidance takes many pixels beyond 1; a clip to [-1, 1] saturates them,
    this keeps their differences.

    Args:
        percentile: p in (0, 1], the share of |x_0| that is to stay below s.
        maximum: c, 1 or more; s lies in [1, c].
    """

    def clip(x_0: Tensor) -> Tensor:
        s = _quantile(x_0.abs().flatten(1), percentile).clamp(1, maximum)  # [B]
        s = per_sample(s.to(x_0.dtype), x_0)
        return torch.minimum(torch.maximum(x_0, -s), s) / s

    return clip


def _quantile(values: Tensor, share: float) -> Tensor:
    """Of each row of [B,N], interpolated; `torch.quantile` takes 16 million values at most."""
    position = share * (values.shape[1] - 1)
    below = math.floor(position)
    low = values.kthvalue(below + 1, dim=1).values
    high = values.kthvalue(math.ceil(position) + 1, dim=1).values
    return torch.lerp(low, high, position - below)
