"""How well an upsampler enlarges held-out pictures, beside Lanczos interpolation.

A true picture is shrunk, enlarged by the model and by Lanczos, and each enlarged set is held
against the true set: the Fréchet distance says whether it looks like the data, the consistency
whether the model kept to the small picture that it was given.

Notation: N pictures, H W pixels, h w pixels of the small picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diff_dalle.evaluation.features import FEATURES, extract
from diff_dalle.evaluation.frechet import frechet_between
from diff_dalle.evaluation.intervals import Interval, mean_over_captions
from diff_dalle.models.low_res import downsample
from diff_dalle.sampling_io.store import Pictures

CONSISTENT_DB = 30.0
_LARGEST_DB = 100.0  # of equal pictures, so that a mean stays finite
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Distances:
    """Fréchet distances to the true pictures, in one kind of features.

    Attributes:
        model: of the model's pictures.
        lanczos: of Lanczos' pictures.
        floor: between two halves of the true pictures: what so few pictures cannot resolve.
    """

    model: float
    lanczos: float
    floor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerReport:
    """What `compare_with_lanczos` measured on N pictures.

    Attributes:
        count: N.
        small_size: h, pixels.
        image_size: H, pixels.
        distances: for each kind of features.
        consistency: dB, mean over pictures: the output shrunk, against the small picture.
        consistent: share of pictures with at least 30 dB.
        psnr_model: dB, mean over pictures, against the true picture.
        psnr_lanczos: the same of Lanczos.
    """

    count: int
    small_size: int
    image_size: int
    distances: dict[str, Distances]
    consistency: Interval
    consistent: float
    psnr_model: Interval
    psnr_lanczos: Interval

    def to_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The report as a Markdown table."""
        lines = [
            f"| {self.count} pictures, {self.small_size} -> {self.image_size} px "
            "| model | Lanczos | true, half against half |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| Fréchet distance, `{name}` | {d.model:.4g} | {d.lanczos:.4g} | {d.floor:.4g} |"
            for name, d in self.distances.items()
        ]
        lines.append(
            f"| against the true picture, dB | {self.psnr_model.mean:.1f} "
            f"| {self.psnr_lanczos.mean:.1f} | |"
        )
        lines.append(
            f"| shrunk, against its input, dB | {self.consistency.mean:.1f} "
            f"({self.consistent:.0%} have {CONSISTENT_DB:.0f}) | | |"
        )
        return "\n".join(lines)


def shrink(pictures: Pictures, size: int) -> Pictures:
    """uint8 [N,H,W,3] -> uint8 [N,size,size,3], as training makes an upsampler's input."""
    chunks = [_shrunk(pictures[i : i + _CHUNK], size) for i in range(0, len(pictures), _CHUNK)]
    return np.concatenate(chunks).round().clip(0, 255).astype(np.uint8)


def enlarge_lanczos(pictures: Pictures, size: int) -> Pictures:
    """uint8 [N,h,w,3] -> uint8 [N,size,size,3]."""
    lanczos = Image.Resampling.LANCZOS
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((size, size), lanczos)) for p in pictures]
    )


def psnr(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratios [N] in dB of pictures [N,H,W,3] in 0 … 255; at most 100."""
    ratios = [
        20 * math.log10(255 / max(float(np.sqrt(np.mean((a - b) ** 2))), 255e-5))
        for a, b in ((a.astype(np.float64), b.astype(np.float64)) for a, b in _pairs(first, second))
    ]
    return np.minimum(np.array(ratios), _LARGEST_DB)


def consistency(output: Pictures, small: Pictures) -> NDArray[np.float64]:
    """dB [N]: outputs [N,H,W,3], shrunk without rounding, against their inputs [N,h,w,3]."""
    size = small.shape[1]
    ratios = [
        psnr(_shrunk(output[i : i + _CHUNK], size), small[i : i + _CHUNK])
        for i in range(0, len(output), _CHUNK)
    ]
    return np.concatenate(ratios)


def compare_with_lanczos(true: Pictures, small: Pictures, output: Pictures) -> UpsamplerReport:
    """The report on an upsampler's pictures.

    Args:
        true: uint8 [N,H,W,3], N ≥ 4.
        small: uint8 [N,h,w,3], `shrink` of them, what the model was given.
        output: uint8 [N,H,W,3], what the model made of it.
    """
    if not true.shape == output.shape or len(small) != len(true):
        raise ValueError(f"true {true.shape}, small {small.shape}, output {output.shape}")
    lanczos = enlarge_lanczos(small, true.shape[1])
    ratios = consistency(output, small)
    return UpsamplerReport(
        count=len(true),
        small_size=small.shape[1],
        image_size=true.shape[1],
        distances={name: _distances(name, true, output, lanczos) for name in FEATURES},
        consistency=mean_over_captions(ratios),
        consistent=float((ratios >= CONSISTENT_DB).mean()),
        psnr_model=mean_over_captions(psnr(output, true)),
        psnr_lanczos=mean_over_captions(psnr(lanczos, true)),
    )


def _distances(name: str, true: Pictures, output: Pictures, lanczos: Pictures) -> Distances:
    features = extract(name, _tensors(true))  # [N, D]
    # Even against odd: neighbours in a file are often alike.
    return Distances(
        model=frechet_between(features, extract(name, _tensors(output))),
        lanczos=frechet_between(features, extract(name, _tensors(lanczos))),
        floor=frechet_between(features[::2], features[1::2]),
    )


def _shrunk(pictures: Pictures, size: int) -> NDArray[np.float32]:
    image = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()  # [B,3,H,W]
    return downsample(image, size).permute(0, 2, 3, 1).numpy()  # [B,size,size,3]


def _tensors(pictures: Pictures) -> Sequence[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(p)).permute(2, 0, 1) for p in pictures]


def _pairs(first: NDArray[Any], second: NDArray[Any]) -> zip[tuple[Any, Any]]:
    if first.shape != second.shape:
        raise ValueError(f"pictures {first.shape} and {second.shape} differ in shape")
    return zip(first, second, strict=True)
