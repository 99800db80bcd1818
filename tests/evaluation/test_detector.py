"""The detector on ground truth, on damaged ground truth, and on pictures that show nothing."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diff_dalle.data.scenes import sample_scene
from diff_dalle.data.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene
from diff_dalle.evaluation.alignment import VERDICT, shapes_detector
from diff_dalle.evaluation.detector import Detector, _lab
from diff_dalle.evaluation.detector_check import (
    Source,
    blurred,
    check_detector,
    check_scenes,
    check_source,
    cloudy_noise,
    jpeg,
    noisy,
    plain,
    white_noise,
)

DETECTOR = shapes_detector()
SCENES = check_scenes(480)


def accuracy(source: Source, scenes: Sequence[Scene]) -> dict[str, float]:
    return {name: share.mean for name, share in check_source(source, scenes).shares.items()}


@pytest.mark.parametrize(("size", "every"), [(64, 1), (256, 4), (1024, 20)])
def test_ground_truth(size: int, every: int) -> None:
    scenes = SCENES[::every]
    shares = accuracy(plain(size), scenes)
    assert min(shares[name] for name in (*VERDICT, "size")) >= 0.995


def test_the_scenes_cover_everything() -> None:
    things = [scene.objects[0] for scene in SCENES]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)


@pytest.mark.parametrize(
    ("damaged", "least"),
    [
        (noisy(8), 0.995),
        (jpeg(95, half_colour=False), 0.995),  # as the demo data are stored
        (jpeg(75, half_colour=True), 0.99),  # small stars lose their tips
        (blurred(1.0), 0.995),
        (noisy(6, radius=0.7), 0.995),
    ],
    ids=["noise", "jpeg 95", "jpeg 75", "blur", "blur and noise"],
)
def test_damaged_ground_truth_at_64_pixels(damaged: Source, least: float) -> None:
    shares = accuracy(damaged, SCENES[::2])
    assert min(shares[name] for name in VERDICT) >= least


def test_place_and_extent() -> None:
    scenes = SCENES[::8]
    found = DETECTOR.detect_all([scene.draw(64) for scene in scenes])
    for scene, seen in zip(scenes, found, strict=True):
        (thing,) = scene.objects
        assert seen.centre == pytest.approx(thing.centre, abs=0.01)
        assert seen.extent == pytest.approx(thing.extent, abs=0.01)


@pytest.mark.parametrize("source", [white_noise, cloudy_noise])
def test_noise_is_right_by_chance_only(source: Source) -> None:
    shares = accuracy(source, SCENES)
    for name, choices in (("background", 8), ("colour", 8), ("shape", 6)):
        spread = math.sqrt((1 / choices) * (1 - 1 / choices) / len(SCENES))
        assert abs(shares[name] - 1 / choices) < 4 * spread
    assert shares["all"] < 0.015


def test_right_pictures_under_wrong_captions_score_by_chance() -> None:
    def another(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
        return SCENES[rng.integers(len(SCENES))].draw(64)

    shares = accuracy(another, SCENES)
    assert shares["background"] == pytest.approx(1 / 8, abs=0.05)
    assert shares["colour"] == pytest.approx(1 / 8, abs=0.05)
    assert shares["shape"] == pytest.approx(1 / 6, abs=0.06)


def test_confidence_tells_scenes_from_noise_and_from_nothing() -> None:
    rng = np.random.default_rng(0)
    scenes = DETECTOR.detect_all([scene.draw(64) for scene in SCENES[::10]])
    noisy = DETECTOR.detect_all([white_noise(SCENES[0], rng) for _ in range(32)])
    assert min(seen.confidence for seen in scenes) > 0.9
    assert max(seen.confidence for seen in noisy) < 0.3
    empty = DETECTOR.detect(np.full((64, 64, 3), BACKGROUNDS["teal"], np.uint8))
    assert (empty.confidence, empty.background) == (0.0, "teal")


def test_a_second_object_lowers_confidence() -> None:
    scenes = [sample_scene(0, index) for index in range(200)]
    several = [scene.draw(64) for scene in scenes if len(scene.objects) > 1]
    found = DETECTOR.detect_all(several)
    # A pale second object beside a striking one may stay below half of its contrast.
    assert np.mean([seen.confidence < 0.9 for seen in found]) > 0.8


def test_a_picture_alone_is_seen_as_in_company() -> None:
    pictures = [scene.draw(64) for scene in SCENES[:40]]
    together = DETECTOR.detect_all(pictures)
    alone = DETECTOR.detect(pictures[37])
    assert alone.shape == together[37].shape
    assert alone.confidence == pytest.approx(together[37].confidence, abs=1e-5)


def test_colours_are_measured_in_cielab() -> None:
    """Published values (Lindbloom's calculator, D65)."""
    rgb = torch.tensor([[255.0, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]) / 255
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0]]
    np.testing.assert_allclose(_lab(rgb).numpy(), np.array(expected), atol=0.05)


def test_no_picture_is_no_trouble_and_a_wrong_one_is_refused() -> None:
    assert DETECTOR.detect_all([]) == []
    with pytest.raises(ValueError, match="uint8"):
        DETECTOR.detect(np.zeros((64, 64, 3), np.float32))


def test_any_palette_will_do() -> None:
    """Nothing in the detector knows the demo scenes."""
    bar = np.zeros((64, 64), np.float32)
    bar[:, 24:40] = 1
    disc = ((np.mgrid[-32:32, -32:32] + 0.5) ** 2).sum(axis=0) < 32**2
    detector = Detector(
        {"lime": (190, 255, 0)}, {"plum": (90, 20, 90)}, {"bar": bar, "disc": disc.astype(float)}
    )
    picture = np.full((64, 64, 3), (90, 20, 90), np.uint8)
    picture[10:50, 30:40] = (190, 255, 0)
    seen = detector.detect(picture)
    assert (seen.background, seen.colour, seen.shape) == ("plum", "lime", "bar")


def test_the_check_shows_every_source() -> None:
    lines = check_detector(8).splitlines()
    assert lines[0].startswith("| 8 scenes | background | colour | shape |")
    assert any(line.startswith("| white noise | ") for line in lines)
