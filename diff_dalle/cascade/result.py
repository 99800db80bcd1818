"""What a cascade hands out: finished pictures, and pictures on their way.

N pictures, H W pixels, h w pixels of the stage before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from diff_dalle.cascade.consistency import Consistency, measure_stages
from diff_dalle.sampling_io.store import Pictures


def to_pictures(images: Tensor) -> Pictures:
    """uint8 [B,3,H,W] on any device -> [B,H,W,3]."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class CascadeResult:
    """Pictures of N prompts.

    Attributes:
        stages: uint8 [N,H,W,3] for each stage, smallest first.
        candidates: for each prompt the number of the candidate that was kept; 0 without rerank.
        low_res: uint8 [N,h,w,3], what the first stage enlarged; None for a base model.
        seconds: that each stage took for all N, their candidates too.
        evaluations: of each stage's network for one picture, its candidates too.
    """

    stages: list[Pictures]
    candidates: list[int]
    low_res: Pictures | None = None
    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)

    @classmethod
    def join(cls, results: Sequence[CascadeResult]) -> CascadeResult:
        """The pictures of several results of the same cascade, in order."""
        small = [result.low_res for result in results if result.low_res is not None]
        return cls(
            stages=[
                np.concatenate(stage)
                for stage in zip(*(result.stages for result in results), strict=True)
            ],
            candidates=[candidate for result in results for candidate in result.candidates],
            low_res=np.concatenate(small) if small else None,
            seconds=[
                sum(stage) for stage in zip(*(result.seconds for result in results), strict=True)
            ],
            evaluations=results[0].evaluations,
        )

    @property
    def images(self) -> list[Image.Image]:
        """The pictures of the last stage."""
        return [Image.fromarray(picture) for picture in self.stages[-1]]

    @property
    def consistency(self) -> list[Consistency | None]:
        """For each stage, how well it kept to the pictures it enlarged; None for a base model."""
        return measure_stages(self.stages, self.low_res)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What the pictures look like on the way.

    Attributes:
        stage: number of the stage, from 0.
        step: steps done in it, from 1; after the last one the images are the stage's result.
        steps: steps that the stage takes.
        images: one picture a prompt, the current estimate of x_0.
    """

    stage: int
    step: int
    steps: int
    images: list[Image.Image]
