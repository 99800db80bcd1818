"""How large the picture of each stage is, from the size that is asked of the last."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diff_dalle.cascade.stages import Stage
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.sampling_io.sizes import Size, parse_size, spell


def choose_sizes(stages: Sequence[Stage], asked: str) -> list[Size]:
    """(H, W) of each stage's picture.

    Args:
        stages: the cascade; each enlarges by the ratio of its own ``image_size`` to
            ``small_size``, whatever the size.
        asked: of the last stage, as `parse_size` reads it; ``auto``: as trained.
    Raises:
        UsageError: a size that a stage cannot make, with the nearest that all can.
    """
    if asked == AUTO:
        return [(stage.image_size, stage.image_size) for stage in stages]
    final = parse_size(asked, "size")
    least = _start(stages[0])
    # A stage's side is that of the first input times a whole number, and a multiple of what its
    # U-Net halves to.
    factors = [stage.image_size // least for stage in stages]
    units = [
        stage.downsampling // math.gcd(stage.downsampling, factor)
        for stage, factor in zip(stages, factors, strict=True)
    ]
    unit = factors[-1] * math.lcm(*units)
    if any(side % unit for side in final):
        height, width = (max(unit, (side + unit // 2) // unit * unit) for side in final)
        raise UsageError(
            f"--size is {asked}: width and height must be multiples of {unit} for these stages; "
            f"the nearest is {width}x{height}"
        )
    height, width = (side // factors[-1] for side in final)
    return [(height * factor, width * factor) for factor in factors]


def small_size(stages: Sequence[Stage], sizes: Sequence[Size]) -> Size | None:
    """(h, w) of what the first stage enlarges; None for a base model."""
    first = stages[0]
    if not first.small_size:
        return None
    height, width = (side * first.small_size // first.image_size for side in sizes[0])
    return height, width


def check_guides(
    stages: Sequence[Stage], sizes: Sequence[Size], strengths: Sequence[float]
) -> None:
    """Raise a `UsageError` where a CLIP would guide pictures of another size than its own.

    It reads noised pictures, which cannot be resized: their noise would be another.

    Args:
        stages: the cascade.
        sizes: of the stages' pictures.
        strengths: of the CLIPs' gradients, one a stage; 0 is none.
    """
    for stage, size, strength in zip(stages, sizes, strengths, strict=True):
        if strength and stage.guide is not None and {*size} != {stage.guide.image_size}:
            raise UsageError(
                f"--size makes a stage {spell(size)} px, but {stage.guide.path} guides pictures "
                f"of {stage.guide.image_size} px alone: give --classifier_scale 0 for it"
            )


def _start(first: Stage) -> int:
    return first.small_size or first.image_size
