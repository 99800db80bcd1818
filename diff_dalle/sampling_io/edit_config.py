"""The knobs of `sample.py` that start from pictures, keep parts of them, or go between prompts."""

from __future__ import annotations

from dataclasses import dataclass

from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What is edited, and how far."""

    init_images: list[str] = knob(
        [], "pictures to edit, one for all prompts or one each: files, folders, shards, an npz"
    )
    masks: list[str] = knob(
        [], "PNGs as large as their pictures, one for all or one each: white is drawn, black stays"
    )
    strength: list[str] = knob(
        ["1.0"], "share of the steps, from the noised picture on (1: from noise); one: stage 1's"
    )
    variation: float | None = knob(
        None, "draw the picture anew with this share of fresh noise, from 0 (none) to 1 (all)"
    )
    interpolate_to: list[str] = knob(
        [], "captions where the frames end, one for all prompts or one each"
    )
    interpolate_seed: int | None = knob(None, "seed of the noise where the frames end")
    frames: int = knob(0, "pictures from each prompt to its end, both included, 2 or more")

    def __post_init__(self) -> None:
        if self.variation is not None:
            require(0 <= self.variation <= 1, "variation", self.variation, "lie between 0 and 1")
        if self.interpolates:
            require(self.frames >= 2, "frames", self.frames, "be 2 or more to go anywhere")
        elif self.frames:
            raise UsageError(
                f"--frames is {self.frames}, but there is no end to go to: give --interpolate_to "
                "or --interpolate_seed"
            )

    @property
    def interpolates(self) -> bool:
        """Whether frames lead from each prompt to another, or to another noise."""
        return bool(self.interpolate_to) or self.interpolate_seed is not None
