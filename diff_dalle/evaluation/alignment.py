"""Whether pictures of one-object scenes say what their captions say.

The truth is read from the caption, the verdict from the picture by `detector.Detector`; both
speak in the words of the demo scenes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diff_dalle.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, shape_mask
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.detector import Detection, Detector
from diff_dalle.evaluation.intervals import Interval, mean_over_captions, wilson

# What is scored; the last ones are groups: `both` is colour and background, `all` adds the shape.
ATTRIBUTES = ("background", "colour", "shape", "size", "position", "both", "all")
VERDICT = ("background", "colour", "shape")
_TEMPLATE_SIZE = 128  # pixels
_SMALL_BELOW = (SIZES["small"][1] + SIZES["large"][0]) / 2  # extent
_CENTRE_BELOW = 0.105  # captions say "centre" up to 0.06 from the middle, "left" from 0.15 on

_CAPTION = re.compile(
    rf"an? ((?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)}) "
    r"(on|(at|in) the (?P<position>left|right|top|bottom|centre) of) "
    rf"an? (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a caption says; None where it says nothing."""

    background: str
    colour: str
    shape: str
    size: str | None = None
    position: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of right pictures, with 95 % intervals.

    Attributes:
        count: pictures.
        shares: for each of `ATTRIBUTES` that any caption mentions, the share of right ones among
            the pictures whose captions mention it.
        confidence: mean over pictures of the detector's confidence.
    """

    count: int
    shares: dict[str, Interval]
    confidence: float

    def table(self) -> str:
        """The shares as a Markdown table."""
        lines = [f"| of {self.count} pictures | right | 95 % interval |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | {share.mean:.3f} | {share.low:.3f} to {share.high:.3f} |"
            for name, share in self.shares.items()
        ]
        return "\n".join(lines)


def shapes_detector() -> Detector:
    """The detector for demo scenes of one object."""
    whole = ((0.5, 0.5), 1.0)  # a bounding box that fills the square
    outlines = {shape: shape_mask(shape, _TEMPLATE_SIZE, *whole) for shape in SHAPES}
    return Detector(COLOURS, BACKGROUNDS, outlines)


def truth_of(caption: str) -> Truth:
    """What a full English caption of a one-object scene says.

    Raises:
        UsageError: the caption is none, or leaves out colour, shape or background.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise UsageError(
            f"{caption!r} is no caption of one object, colour, shape and background in the words "
            "of the demo scenes: such are written by --write_captions"
        )
    return Truth(**match.groupdict())


def truth_of_scene(scene: Scene) -> Truth:
    """What is true of a one-object scene, its place left out."""
    (thing,) = scene.objects
    return Truth(scene.background, thing.colour, thing.shape, thing.size)


def size_of(detection: Detection) -> str:
    """The nearest word of size."""
    return "small" if detection.extent < _SMALL_BELOW else "large"


def position_of(detection: Detection) -> str:
    """The nearest word of position."""
    right, down = (place - 0.5 for place in detection.centre)
    if max(abs(right), abs(down)) < _CENTRE_BELOW:
        return "centre"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def right(
    detections: Sequence[Detection], truths: Sequence[Truth]
) -> dict[str, NDArray[np.floating]]:
    """For each of `ATTRIBUTES`: 1 where it is right, 0 where wrong, NaN where unsaid; [N]."""
    found = [
        {
            **{name: getattr(seen, name) for name in VERDICT},
            "size": size_of(seen),
            "position": position_of(seen),
        }
        for seen in detections
    ]
    table = {
        name: np.array(
            [
                np.nan if getattr(said, name) is None else float(seen[name] == getattr(said, name))
                for seen, said in zip(found, truths, strict=True)
            ]
        )
        for name in ("background", "colour", "shape", "size", "position")
    }
    table["both"] = table["colour"] * table["background"]
    table["all"] = table["both"] * table["shape"]
    return table


def score_detections(detections: Sequence[Detection], truths: Sequence[Truth]) -> Scores:
    """Scores of what a detector said, against captions; Wilson intervals."""
    shares = {}
    for name, values in right(detections, truths).items():
        said = values[~np.isnan(values)]
        if len(said):
            shares[name] = wilson(int(said.sum()), len(said))
    confidence = float(np.mean([seen.confidence for seen in detections]))
    return Scores(count=len(truths), shares=shares, confidence=confidence)


def score(images: Sequence[NDArray[np.uint8]], truths: Sequence[Truth]) -> Scores:
    """Scores of pictures uint8 [H,W,3] (or one array [N,H,W,3]) against captions."""
    return score_detections(shapes_detector().detect_all(images), truths)


def agreement(first: Sequence[Detection], second: Sequence[Detection]) -> dict[str, Interval]:
    """Shares of pairs with the same background, colour, shape, and all three (``verdict``)."""
    same = {
        name: [getattr(a, name) == getattr(b, name) for a, b in zip(first, second, strict=True)]
        for name in VERDICT
    }
    same["verdict"] = [all(triple) for triple in zip(*same.values(), strict=True)]
    return {name: wilson(sum(equal), len(equal)) for name, equal in same.items()}


def average_shares(tables: Sequence[dict[str, NDArray[np.floating]]]) -> dict[str, Interval]:
    """Mean shares over captions of several `right` tables of the same captions, one a seed."""
    means = {}
    for name in tables[0]:
        values = np.stack([table[name] for table in tables], axis=1)  # [captions, seeds]
        said = ~np.isnan(values).any(axis=1)
        if said.sum() >= 2:
            means[name] = mean_over_captions(values[said])
    return means
