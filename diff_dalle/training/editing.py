"""What one stage starts from and keeps beside its condition: pictures, masks, a second noise.

B batch, C channels, H W pixels, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.diffusion.editing import KeepKnown, on_sphere
from diff_dalle.diffusion.gaussian import Clip
from diff_dalle.models.generator import Cond, Generator


@dataclass(frozen=True, kw_only=True)
class Between:
    """The far end of a way between two pictures, and how far along it each of B pictures lies.

    Attributes:
        keys: int64 [B], whose noise is at the end; None where the noise stays.
        share: float64 [B] on the CPU, 0 at the start and 1 at the end.
        cond: tokens and mask [B,L] of the caption at the end; None where the caption stays.
    """

    share: Tensor
    keys: Tensor | None = None
    cond: Cond | None = None

    def encode(self, generator: Generator, cond: Cond) -> Cond:
        """``cond`` with a text that lies between the captions, encoded.

        A straight line between the features, position by position; the encoder gives zeros for
        padding, and both captions' tokens are read. At the ends only that end's own are, so
        that they are the captions themselves.
        """
        if self.cond is None:
            return cond
        here, there = generator.encode(cond), generator.encode(self.cond)
        assert here.text is not None and there.text is not None
        assert here.mask is not None and there.mask is not None
        share = self.share.to(here.text.device)[:, None]  # [B,1]
        weight = share[:, :, None].to(here.text.dtype)
        mask = (here.mask & (share < 1)) | (there.mask & (share > 0))
        return replace(here, tokens=None, text=torch.lerp(here.text, there.text, weight), mask=mask)

    def noise(self, keys: Tensor, noise: Tensor, stream: int) -> Tensor:
        """``noise`` [B,...] of ``keys`` [B], brought towards the same stream of the end's keys."""
        if self.keys is None:
            return noise
        end = keyed_noise.normal(self.keys, tuple(noise.shape[1:]), stream).to(noise.dtype)
        same = (keys == self.keys).reshape(-1, *[1] * (noise.ndim - 1))
        # A sphere's points are those of independent noises: the way from one to itself is none.
        return torch.where(same, noise, on_sphere(noise, end, self.share))


@dataclass(frozen=True, kw_only=True)
class StageEdit:
    """What one stage starts from and keeps; without any field it draws as ever.

    Attributes:
        picture: [B,C,H,W] in [-1, 1] of the stage's size. It is what ``strength`` and
            ``variation`` start from, and what is known.
        drawn: [B,1,H,W] in [0, 1], 1 where the stage draws, 0 where ``picture`` is known; None:
            it draws everywhere.
        between: the way on which captions and noise lie.
    """

    picture: Tensor | None = None
    drawn: Tensor | None = None
    between: Between | None = None

    def clip(self, clip: Clip) -> Clip:
        """``clip``, and the known part put back."""
        if self.drawn is None or self.picture is None:
            return clip
        return KeepKnown(clip, self.picture, self.drawn)

    def encode(self, generator: Generator, cond: Cond) -> Cond:
        """``cond``, its text encoded where it lies between captions."""
        return self.between.encode(generator, cond) if self.between else cond

    def noise(self, keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
        """Standard normal numbers, float32 [B,*shape], as `keyed_noise.normal`."""
        noise = keyed_noise.normal(keys, shape, stream)
        return self.between.noise(keys, noise, stream) if self.between else noise
