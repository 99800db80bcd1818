"""Whether an upsampler kept to the small picture that it was given.

Notation: N pictures, H W pixels, h w pixels of the small picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diff_dalle.models.low_res import downsample
from diff_dalle.sampling_io.store import Pictures

LARGEST_DB = 100.0  # of equal pictures, so that a mean stays finite
_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How far N outputs, shrunk without rounding, lie from the small pictures they were made of.

    Attributes:
        psnr: float64 [N], peak signal-to-noise ratios in dB, at most 100.
        mean_abs: float64 [N], mean absolute differences in grey levels, 0 … 255.
    """

    psnr: NDArray[np.float64]
    mean_abs: NDArray[np.float64]

    def to_json(self, index: int) -> dict[str, float]:
        """What a manifest says of one of the N pictures."""
        psnr, mean_abs = float(self.psnr[index]), float(self.mean_abs[index])
        return {"psnr_db": round(psnr, 3), "mean_abs_levels": round(mean_abs, 3)}


def measure(output: Pictures, small: Pictures) -> Consistency:
    """Hold outputs, uint8 [N,H,W,3], against their inputs, uint8 [N,h,w,3]."""
    again = shrunk(output, (small.shape[1], small.shape[2]))  # [N,h,w,3]
    differences = [
        np.abs(a - b.astype(np.float64)).mean() for a, b in zip(again, small, strict=True)
    ]
    return Consistency(psnr=psnr(again, small), mean_abs=np.array(differences))


def measure_stages(
    stages: Sequence[Pictures], low_res: Pictures | None
) -> list[Consistency | None]:
    """`measure` for each stage of a cascade against the one before; None for a base model.

    Args:
        stages: uint8 [N,H,W,3] a stage, smallest first.
        low_res: uint8 [N,h,w,3] that the first stage enlarged; None for a base model.
    """
    inputs = [low_res, *stages[:-1]]
    return [
        None if small is None else measure(output, small)
        for output, small in zip(stages, inputs, strict=True)
    ]


def describe_consistency(images: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[str]:
    """One line with the means over a run's pictures; none where no stage is an upsampler.

    Args:
        images: a manifest's, each with ``consistency``: `Consistency.to_json` or None a stage.
        sizes: of the stages in pixels, as users read them.
    """
    parts = []
    for stage, size in enumerate(sizes):
        told = [image["consistency"][stage] for image in images]
        if None not in told:
            ratio, levels = (
                sum(entry[name] for entry in told) / len(told)
                for name in ("psnr_db", "mean_abs_levels")
            )
            parts.append(f"{size} px {ratio:.1f} dB ({levels:.1f} of 255 grey levels)")
    return [f"shrunk, against what was enlarged, on average: {', '.join(parts)}"] if parts else []


def psnr(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratios [N] in dB of pictures [N,H,W,3] in 0 … 255; at most 100."""
    if first.shape != second.shape:
        raise ValueError(f"pictures {first.shape} and {second.shape} differ in shape")
    ratios = [
        20 * math.log10(255 / max(float(np.sqrt(np.mean((a - b) ** 2))), 255e-5))
        for a, b in (
            (a.astype(np.float64), b.astype(np.float64)) for a, b in zip(first, second, strict=True)
        )
    ]
    return np.minimum(np.array(ratios), LARGEST_DB)


def shrunk(pictures: Pictures, size: tuple[int, int]) -> NDArray[np.float32]:
    """uint8 [N,H,W,3] -> [N,h,w,3] in 0 … 255, not rounded, as training shrinks."""
    chunks = [pictures[i : i + _CHUNK] for i in range(0, len(pictures), _CHUNK)]
    # A copy each: pictures read from a file may not be writable, which from_numpy warns of.
    images = (torch.tensor(chunk).permute(0, 3, 1, 2).float() for chunk in chunks)
    small = [downsample(image, size).permute(0, 2, 3, 1).numpy() for image in images]
    return np.concatenate(small)
