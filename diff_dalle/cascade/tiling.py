"""In which tiles each stage's network is asked, from the flags, checked against the stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diff_dalle.cascade.stages import Stage
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, require
from diff_dalle.models.tiles import count_tiles
from diff_dalle.sampling_io.config import SampleConfig, numbers, per_stage
from diff_dalle.sampling_io.sizes import Size, spell

_SHARE = 4  # of a tile that neighbours have in common where nothing is said


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of one stage; the fields are those of `StageSettings`, 0 for whole pictures."""

    tile_size: int = 0
    tile_overlap: int = 0

    def count(self, stage: Stage, size: Size) -> int:
        """How many of them make a picture of that size."""
        if not self.tile_size:
            return 1
        return count_tiles(size, self.tile_size, self.tile_overlap, stage.downsampling)


def choose_tiles(stages: Sequence[Stage], cfg: SampleConfig, sizes: Sequence[Size]) -> list[Tiling]:
    """One entry a stage; a picture that is no larger than a tile is drawn whole.

    Args:
        stages: the cascade.
        cfg: the flags.
        sizes: of the stages' pictures.
    Raises:
        UsageError: tiles for a base model or of a size that its U-Net cannot take, an overlap
            that leaves nothing of a tile, or flags that no stage reads.
    """
    count = len(stages)
    asked = _whole(cfg.tile_size, "tile_size")
    tiles = per_stage(asked, count, "tile_size")
    overlaps = per_stage(cfg.tile_overlap, count, "tile_overlap")
    if len(cfg.tile_size) == 1:  # one for all is for those that can be tiled
        tiles = [tile if s.small_size else 0 for tile, s in zip(tiles, stages, strict=True)]
    found = [
        _tiling(stage, tile, overlap, size)
        for stage, tile, overlap, size in zip(stages, tiles, overlaps, sizes, strict=True)
    ]
    if any(found):
        return [tiling or Tiling() for tiling in found]
    if any(asked):
        largest = spell(sizes[-1])
        raise UsageError(
            f"--tile_size is {' '.join(cfg.tile_size)}: no upsampler here makes a larger picture "
            f"(the last stage's is {largest} px): give less, or 0"
        )
    for name, idle in (
        ("tile_overlap", cfg.tile_overlap == [AUTO]),
        ("tile_batch", cfg.tile_batch == 1),
    ):
        require(idle, name, getattr(cfg, name), "stand beside --tile_size")
    return [Tiling() for _ in stages]


def describe_tiles(number: int, tile: int, overlap: int) -> str:
    """A line that says what drawing a stage in tiles changes.

    Args:
        number: of the stage, from 1.
        tile: pixels of a side.
        overlap: pixels that neighbours share.
    """
    return (
        f"stage {number} is drawn in tiles of {tile} px that share {overlap}: its norms and "
        "attention see one tile at a time, so its pictures are not those drawn whole"
    )


def _tiling(stage: Stage, tile: int, overlap: str, size: Size) -> Tiling | None:
    """The tiles of one stage; None for a picture that is drawn whole."""
    if not tile:
        return None
    if not stage.small_size:
        raise UsageError(
            f"--tile_size is {tile}, but {stage.path} is a base model, which lays out the whole "
            "picture: give 0 for its stage"
        )
    if tile >= max(size):
        return None
    if stage.loaded.run.unet.attention_positions:
        raise UsageError(
            f"--tile_size is {tile}, but {stage.path} is told places in the whole picture "
            "(--attention_positions): give 0 for its stage"
        )
    unit = stage.downsampling
    must = f"be a multiple of {unit}, by the U-Net of {stage.path}"
    require(tile % unit == 0, "tile_size", tile, must)
    if overlap == AUTO:
        quarter = math.ceil(tile / (_SHARE * unit)) * unit  # up: tiles that share nothing show
        return Tiling(tile_size=tile, tile_overlap=min(quarter, tile - unit))
    (shared,) = _whole([overlap], "tile_overlap")
    fits = shared < tile and shared % unit == 0
    must = f"be a multiple of {unit} and less than --tile_size ({tile})"
    require(fits, "tile_overlap", shared, must)
    return Tiling(tile_size=tile, tile_overlap=shared)


def _whole(texts: Sequence[str], name: str) -> list[int]:
    """Whole numbers of pixels, 0 or more."""
    values = numbers(texts, name)
    for value in values:
        require(value >= 0 and value % 1 == 0, name, f"{value:g}", "be whole pixels, 0 or more")
    return [int(value) for value in values]
