"""How far the detector can be trusted: its scores on pictures whose truth is known.

Drawn scenes at several sizes, scenes damaged as generated or stored pictures are, and pictures
that show nothing, where it must be right by chance only.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diff_dalle.data.scenes import one_object_scenes
from diff_dalle.data.shapes import Scene
from diff_dalle.evaluation.alignment import (
    VERDICT,
    Scores,
    score_detections,
    shapes_detector,
    truth_of_scene,
)

Picture = NDArray[np.uint8]
Source = Callable[[Scene, np.random.Generator], Picture]

_SHOWN = (*VERDICT, "size", "all")


def plain(size: int) -> Source:
    """Scenes as they are, ``size`` pixels."""
    return lambda scene, rng: scene.draw(size)


def noisy(level: float, *, radius: float = 0.0) -> Source:
    """64 px scenes with Gaussian noise in grey levels, blurred before by ``radius`` pixels."""

    def draw(scene: Scene, rng: np.random.Generator) -> Picture:
        picture = blurred(radius)(scene, rng) + rng.normal(0, level, (64, 64, 3))
        return picture.round().clip(0, 255).astype(np.uint8)

    return draw


def blurred(radius: float) -> Source:
    """64 px scenes under a Gaussian of ``radius`` pixels."""

    def draw(scene: Scene, rng: np.random.Generator) -> Picture:
        picture = Image.fromarray(scene.draw(64))
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))

    return draw


def jpeg(quality: int, *, half_colour: bool) -> Source:
    """64 px scenes through JPEG, perhaps with colour at half the resolution (4:2:0)."""

    def draw(scene: Scene, rng: np.random.Generator) -> Picture:
        file = io.BytesIO()
        subsampling = 2 if half_colour else 0
        Image.fromarray(scene.draw(64)).save(file, "JPEG", quality=quality, subsampling=subsampling)
        return np.asarray(Image.open(file).convert("RGB"))

    return draw


def white_noise(scene: Scene, rng: np.random.Generator) -> Picture:
    """Independent pixels; the scene is not looked at."""
    return rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def cloudy_noise(scene: Scene, rng: np.random.Generator) -> Picture:
    """Coloured clouds; the scene is not looked at."""
    few = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(few.resize((64, 64), Image.Resampling.BICUBIC))


SOURCES: dict[str, Source] = {
    "64 px": plain(64),
    "256 px": plain(256),
    "1024 px": plain(1024),
    "64 px, JPEG 95 (as the demo data)": jpeg(95, half_colour=False),
    "64 px, JPEG 75, 4:2:0": jpeg(75, half_colour=True),
    "64 px, noise of 8 levels": noisy(8),
    "64 px, blurred by 1 px": blurred(1),
    "64 px, blurred by 0.7 px, noise of 6 levels": noisy(6, radius=0.7),
    "white noise": white_noise,
    "cloudy noise": cloudy_noise,
}


def check_scenes(count: int) -> list[Scene]:
    """One-object scenes, half of them combinations that training never shows."""
    half = count // 2
    return [
        *one_object_scenes(half, 0, held_out_only=True),
        *one_object_scenes(count - half, 0, held_out_only=False),
    ]


def check_source(source: Source, scenes: Sequence[Scene]) -> Scores:
    """The detector's scores on one source of pictures."""
    rng = np.random.default_rng(0)
    found = shapes_detector().detect_all(source(scene, rng) for scene in scenes)
    return score_detections(found, [truth_of_scene(scene) for scene in scenes])


def check_detector(count: int) -> str:
    """The scores on all sources, as a Markdown table; shares of ``count`` scenes each."""

    def rows() -> Iterator[str]:
        yield f"| {count} scenes | {' | '.join(_SHOWN)} | confidence |"
        yield "| --- " * (len(_SHOWN) + 2) + "|"
        scenes = check_scenes(count)
        for name, source in SOURCES.items():
            scores = check_source(source, scenes)
            shares = " | ".join(f"{scores.shares[key].mean:.4f}" for key in _SHOWN)
            yield f"| {name} | {shares} | {scores.confidence:.2f} |"

    return "\n".join(rows())
