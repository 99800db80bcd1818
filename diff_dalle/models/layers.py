"""The parts that every network here is built of.

All parts accept either memory format. On the CPU they return the one that they were given, so
features stay in channels_last from the stem to the head. On CUDA torch's group norm always returns
contiguous features (native_group_norm asks for that format off the CPU), so they change format at
every norm and again at the next convolution, whose kernels are channels_last.

Notation: B batch, C channels, H W pixels, E width of the time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def zero_(module: Module) -> Module:
    """Set every parameter of ``module`` to zero, in place, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def channels_last_(module: nn.Module) -> None:
    """Lay the kernels of ``module`` out in channels_last memory, in place.

    Convolutions then answer in channels_last, and attention reads the features as tokens without
    a copy where the norm before it keeps the format, as on the CPU.
    """
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines and sines of ``t`` at geometrically spaced frequencies.

    Args:
        t: [B], integer or float; timesteps, or any level scaled to about 0 … 1000.
        dim: width of the result, even.
        max_period: the slowest frequency is about one over this.
    Returns:
        float32 [B,dim] (float64 for a float64 ``t``): the cosines, then the sines.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    ramp = torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    frequencies = torch.exp(-math.log(max_period) * ramp)  # [dim/2]
    angles = t.to(dtype)[:, None] * frequencies  # [B,dim/2]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class LevelEmbedding(nn.Module):
    """A number (timestep or noise level) -> sinusoids -> two linear layers.

    Args:
        channels: width of the sinusoids.
        out_channels: E, width of the result.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = nn.Linear(channels, out_channels)
        self.out = nn.Linear(out_channels, out_channels)

    def forward(self, t: Tensor) -> Tensor:
        """[B], integer or float -> [B,E]."""
        waves = sinusoidal_embedding(t, self.channels).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(waves)))


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018), in ADM's 32 groups unless told otherwise.

    A width that ``groups`` does not divide gets the largest number that divides both.
    """

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__(math.gcd(groups, channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W] in the dtype of ``x``."""
        if x.dtype == torch.float32 or x.dtype == self.weight.dtype:
            return super().forward(x)
        # Autocast would send x through float32 and back: two passes over memory for nothing,
        # since the kernel sums in float32 whatever the dtype of x.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Positions(nn.Module):
    """A learned vector for every place of a feature map, added to it.

    Convolutions see where they are only at the padding; attention does not see it at all.

    Args:
        channels: C.
        size: H = W of the feature map of a whole image.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        # Half as large as the normalised features it is added to: heard from the first step.
        self.table = nn.Parameter(0.5 * torch.randn(1, channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]; for another size than the learned one, stretched to it."""
        table = self.table.to(x.dtype)
        if table.shape[2:] != x.shape[2:]:
            table = F.interpolate(table, x.shape[2:], mode="bilinear")
        return x + table


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution (ADM without resblock_updown)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,2H,2W]."""
        return self.conv(double(x))


class Downsample(nn.Module):
    """A convolution of stride 2 (ADM without resblock_updown)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H/2,W/2]."""
        return self.conv(x)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling: [B,C,H,W] -> [B,C,2H,2W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halve(x: Tensor) -> Tensor:
    """Mean over 2 x 2 pixels: [B,C,H,W] -> [B,C,H/2,W/2]."""
    return F.avg_pool2d(x, 2)


def _same(x: Tensor) -> Tensor:
    return x


_RESAMPLE: dict[str | None, Callable[[Tensor], Tensor]] = {None: _same, "up": double, "down": halve}


class ResBlock(nn.Module):
    """ADM's residual block (Dhariwal and Nichol 2021, section 3).

    Args:
        channels: C of the input.
        out_channels: C of the output.
        embedding: E.
        dropout: probability, in [0, 1).
        scale_shift: the embedding scales and shifts the second norm; else it is added before.
        resample: "up" or "down" doubles or halves the size, between the first norm and
            convolution and on the skip; None keeps it.
        norm_groups: groups of both norms.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = _RESAMPLE[resample]
        self.norm_in = GroupNorm(channels, norm_groups)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        self.norm_out = GroupNorm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features [B,C,H,W], activated embedding [B,E] -> [B,C',H',W']."""
        h = self.conv_in(self.resample(F.silu(self.norm_in(x))))
        told = self.embed(embedding).to(h.dtype)[:, :, None, None]  # [B,2C' or C',1,1]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        else:
            h = self.norm_out(h + told)
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.skip(self.resample(x)) + h
