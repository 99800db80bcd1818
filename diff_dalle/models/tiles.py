"""A generator asked about a large picture in overlapping tiles, its answers joined smoothly.

The join is MultiDiffusion's (Bar-Tal et al. 2023): of all pictures the one nearest to every
tile's answer, in weighted squares, which is the weighted mean at each pixel.

Notation: B batch, H W pixels, h w of the low-resolution input, N tiles along an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from diff_dalle.models.attention import TextMemory
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.models.low_res import enlarge


@dataclass(frozen=True, eq=False)
class Axis:
    """How one axis of a picture is cut.

    Attributes:
        starts: the first pixel of each of the N tiles.
        tile: pixels of each.
        weights: float64 [N,tile], 0 or more; at each pixel of the axis they sum to 1.
    """

    starts: list[int]
    tile: int
    weights: Tensor

    @classmethod
    def cut(cls, length: int, tile: int, overlap: int, unit: int) -> Axis:
        """As few tiles as will do, evenly spread.

        Args:
            length: pixels of the axis, a multiple of ``unit``.
            tile: pixels of a tile, a multiple of ``unit``; an axis that is no longer is one tile.
            overlap: pixels that neighbours share at least, less than ``tile``; a multiple of
                ``unit``.
            unit: tiles start at its multiples, as a network that halves its features needs to
                see in a tile what it sees in the whole.
        """
        if length <= tile:
            return cls([0], length, _weights(length, length, [0]))
        rest = (length - tile) // unit
        steps = math.ceil(rest * unit / (tile - overlap))  # from the first tile to the last
        starts = [n * rest // steps * unit for n in range(steps + 1)]
        return cls(starts, tile, _weights(length, tile, starts))


def _weights(length: int, tile: int, starts: Sequence[int]) -> Tensor:
    """Each tile's share of every pixel, [N,tile].

    A share rises and falls as sin², in the middle half of what two tiles have in common: in the
    outer quarters an answer still feels the end of its tile, and does not count at all.
    """
    place = torch.arange(tile, dtype=torch.float64) + 0.5
    weights = torch.ones(len(starts), tile, dtype=torch.float64)
    for n, (start, following) in enumerate(zip(starts, starts[1:], strict=False)):
        common = start + tile - following
        part = (place - common / 4) / max(common / 2, 1e-9)  # 0 to 1 in the middle half
        rise = torch.sin(part.clamp(0, 1) * torch.pi / 2) ** 2
        weights[n + 1] *= rise
        weights[n] *= rise.flip(0)
    total = torch.zeros(length, dtype=torch.float64)  # not 1 where three tiles meet
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    return torch.stack([w / total[s : s + tile] for s, w in zip(starts, weights, strict=True)])


def count_tiles(size: tuple[int, int], tile: int, overlap: int, unit: int) -> int:
    """How many tiles make a picture of (H, W); see `Axis.cut`."""
    return math.prod(len(Axis.cut(length, tile, overlap, unit).starts) for length in size)


class TiledGenerator(nn.Module):
    """A generator that is never shown more than a tile at a time; called as a `Generator`.

    A tile is told its own part of the enlarged low-resolution input, so with a network that sees
    no further than a quarter of the overlap the answer is the one about the whole picture.

    Args:
        generator: an upsampler.
        size: (H, W) of the pictures, multiples of its U-Net's ``downsampling``.
        tile: pixels a side of a tile; see `Axis.cut`.
        overlap: pixels that neighbours share at least; see `Axis.cut`.
        batch: tiles that the generator is asked about at once; memory and speed only.
    """

    def __init__(
        self, generator: Generator, size: tuple[int, int], tile: int, overlap: int, batch: int = 1
    ) -> None:
        super().__init__()
        self.generator = generator
        self.cfg = generator.cfg
        unit = generator.unet.cfg.downsampling
        self._rows, self._columns = (Axis.cut(length, tile, overlap, unit) for length in size)
        self._batch = batch

    def encode(self, cond: Cond) -> Cond:
        """See `Generator.encode`."""
        return self.generator.encode(cond)

    def remember(self, cond: Cond) -> Cond:
        """See `Generator.remember`."""
        return self.generator.remember(cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """As `Generator.forward`, of pictures of the one size."""
        if cond.low_res is not None:
            cond = replace(cond, low_res=enlarge(cond.low_res, (x_t.shape[2], x_t.shape[3])))
        down, across = range(len(self._rows.starts)), range(len(self._columns.starts))
        places = list(product(down, across, range(len(x_t))))
        # On the device, once: a list would be copied there, and waited for, at every tile.
        numbers = torch.arange(len(places), device=x_t.device) % len(x_t)
        # Halves would round every tile's share before they are added.
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        rows, columns = (
            axis.weights.to(x_t.device, dtype) for axis in (self._rows, self._columns)
        )  # [N,tile] each
        answer: Tensor | None = None
        for first in range(0, len(places), self._batch):
            chunk = places[first : first + self._batch]
            part = self._ask(x_t, t, cond, chunk, numbers[first : first + self._batch])
            if answer is None:
                answer = part.new_zeros((len(x_t), part.shape[1], *x_t.shape[2:]), dtype=dtype)
            for (row, column, n), tile in zip(chunk, part, strict=True):
                share = rows[row][:, None] * columns[column]  # [tile,tile]
                self._cut(answer[n], row, column).add_(share * tile)
        assert answer is not None
        return answer.to(x_t.dtype)

    def _ask(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        chunk: Sequence[tuple[int, int, int]],
        numbers: Tensor,
    ) -> Tensor:
        """The generator's answer [batch,C,tile,tile] about tiles (row, column, picture).

        ``numbers`` are those of the pictures once more, int64 [batch] on the device.
        """

        def tiles(pictures: Tensor) -> Tensor:
            return torch.stack([self._cut(pictures[n], row, column) for row, column, n in chunk])

        told: dict[str, Any] = {}
        for field in fields(cond):
            value = getattr(cond, field.name)
            if isinstance(value, TextMemory):
                told[field.name] = value.of(numbers)
            elif value is not None:
                told[field.name] = value[numbers]
        if cond.low_res is not None:
            told["low_res"] = tiles(cond.low_res)
        return self.generator(tiles(x_t), t[numbers], Cond(**told))

    def _cut(self, picture: Tensor, row: int, column: int) -> Tensor:
        """One tile of [C,H,W], a view."""
        top, left = self._rows.starts[row], self._columns.starts[column]
        return picture[:, top : top + self._rows.tile, left : left + self._columns.tile]
