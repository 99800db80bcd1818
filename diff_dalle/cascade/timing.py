"""What a sampling run's pictures took, stage by stage, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What this call drew; pictures from before an interruption are not in it.

    Attributes:
        images: that were drawn.
        seconds: of each stage for all of them, every rank's added up.
    """

    images: int
    seconds: tuple[float, ...]

    @classmethod
    def total(cls, parts: Sequence[Timing]) -> Timing:
        """Several ranks' or batches' together, one or more."""
        stages = zip(*(part.seconds for part in parts), strict=True)
        return cls(
            images=sum(part.images for part in parts),
            seconds=tuple(map(sum, stages)),
        )

    @property
    def per_image(self) -> list[float]:
        """Seconds of each stage for one picture on one rank; no entry where nothing was drawn."""
        return [seconds / self.images for seconds in self.seconds] if self.images else []

    def describe(self, names: Sequence[str]) -> list[str]:
        """A line for the user, or none where nothing was drawn.

        Args:
            names: of the stages, the sizes of their pictures.
        """
        if not self.images:
            return []
        parts = zip(names, self.per_image, strict=True)
        told = ", ".join(f"{name} px {seconds:.2g} s" for name, seconds in parts)
        return [f"{told} a picture ({self.images} drawn)"]

    def to_json(self) -> dict[str, Any]:
        """What the manifest says."""
        return {"images": self.images, "seconds_per_image": self.per_image}
