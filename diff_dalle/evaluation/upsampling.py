"""How well an upsampler enlarges held-out pictures, beside Lanczos interpolation.

A true picture is shrunk, enlarged by the model and by Lanczos, and each enlarged set is held
against the true set: the Fréchet distance says whether it looks like the data, the consistency
whether the model kept to the small picture that it was given.

Notation: N pictures, H W pixels, h w pixels of the small picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff_dalle.cascade.consistency import measure, psnr
from diff_dalle.evaluation.features import ANY_PICTURE, extract
from diff_dalle.evaluation.frechet import frechet_between
from diff_dalle.evaluation.intervals import Interval, mean_over_captions
from diff_dalle.sampling_io.store import Pictures

CONSISTENT_DB = 30.0


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


def enlarge_lanczos(pictures: Pictures, size: int) -> Pictures:
    """uint8 [N,h,w,3] -> uint8 [N,size,size,3]."""
    lanczos = Image.Resampling.LANCZOS
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((size, size), lanczos)) for p in pictures]
    )


def compare_with_lanczos(
    true: Pictures, small: Pictures, output: Pictures, features: Sequence[str] = ANY_PICTURE
) -> UpsamplerReport:
    """The report on an upsampler's pictures.

    Args:
        true: uint8 [N,H,W,3], N ≥ 4.
        small: uint8 [N,h,w,3], `shrunk_to` of them, what the model was given.
        output: uint8 [N,H,W,3], what the model made of it.
        features: kinds of features for the Fréchet distances, of `FEATURES`.
    """
    if not true.shape == output.shape or len(small) != len(true):
        raise ValueError(f"true {true.shape}, small {small.shape}, output {output.shape}")
    lanczos = enlarge_lanczos(small, true.shape[1])
    ratios = measure(output, small).psnr
    return UpsamplerReport(
        count=len(true),
        small_size=small.shape[1],
        image_size=true.shape[1],
        distances={name: _distances(name, true, output, lanczos) for name in features},
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


def _tensors(pictures: Pictures) -> Sequence[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(p)).permute(2, 0, 1) for p in pictures]
