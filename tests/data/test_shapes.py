"""Drawing: areas and outlines known from geometry, one picture at every size."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diff_dalle.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    draw_scene,
    shape_mask,
)

HOLE, ARM = 0.55, 0.34


def star() -> list[tuple[float, float]]:
    """The ten corners of a pentagram, stretched to the box [-1, 1] x [-1, 1]."""
    inner = math.sin(math.radians(18)) / math.sin(math.radians(54))
    corners = []
    for k in range(10):
        radius, angle = (1.0, inner)[k % 2], math.radians(36 * k)
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    width = math.sin(math.radians(72))
    height = (1 + math.cos(math.radians(36))) / 2
    return [(x / width, (y + 1) / height - 1) for x, y in corners]


POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": star(),
    "cross": [
        *[(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)],
        *[(ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    ],
}


def area(polygon: list[tuple[float, float]]) -> float:
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2


AREAS = {
    **{name: area(polygon) for name, polygon in POLYGONS.items()},
    "circle": math.pi,
    "ring": math.pi * (1 - HOLE**2),
}


@pytest.mark.parametrize("size", [32, 64, 100, 256, 1024])
@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_that_of_the_shape(shape: str, size: int) -> None:
    mask = shape_mask(shape, size, (0.51, 0.48), 0.5)
    assert mask.shape == (size, size)
    assert 0 <= mask.min() and mask.max() == 1
    assert mask.mean() == pytest.approx(AREAS[shape] * 0.25**2, rel=4e-3)


@pytest.mark.parametrize("shape", POLYGONS)
def test_outline_matches_another_drawing_program(shape: str) -> None:
    fine = Image.new("L", (2048, 2048))
    corners = [((x * 0.3 + 0.5) * 2048, (y * 0.3 + 0.45) * 2048) for x, y in POLYGONS[shape]]
    ImageDraw.Draw(fine).polygon(corners, fill=255)
    expected = np.asarray(fine.reduce(16), dtype=np.float32) / 255  # 128 px
    difference = np.abs(shape_mask(shape, 128, (0.5, 0.45), 0.6) - expected)
    assert difference.mean() < 1.5e-3
    assert difference.max() < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box(shape: str) -> None:
    mask = shape_mask(shape, 1024, (0.5, 0.5), 0.5)
    rows, columns = np.where(mask > 0.5)
    # The tips of a star are thinner than a pixel, so they end a little early.
    assert abs(columns.min() - 256) <= 2 and abs(columns.max() - 767) <= 2
    assert abs(rows.min() - 256) <= 2 and abs(rows.max() - 767) <= 2


def test_outlines_are_clearly_different_at_64_pixels() -> None:
    for extent in (SIZES["small"][0], SIZES["large"][0]):
        masks = {shape: shape_mask(shape, 64, (0.5, 0.5), extent) for shape in SHAPES}
        for a, b in itertools.combinations(masks.values(), 2):
            assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.8


def test_sizes_do_not_meet() -> None:
    assert SIZES["large"][0] >= 1.4 * SIZES["small"][1]


def test_colours_are_clearly_different() -> None:
    assert (len(COLOURS), len(BACKGROUNDS), len(SHAPES)) == (8, 8, 6)
    everything = {**COLOURS, **BACKGROUNDS}
    assert len(everything) == 16
    for a, b in itertools.combinations(everything.values(), 2):
        assert math.dist(a, b) >= 80


def three_objects() -> Scene:
    places = [(0.27, 0.26), (0.73, 0.28), (0.48, 0.74)]
    objects = tuple(
        SceneObject(shape=shape, colour=colour, size="large", centre=centre, extent=0.44)
        for shape, colour, centre in zip(
            ("star", "ring", "triangle"), ("red", "blue", "yellow"), places, strict=True
        )
    )
    return Scene(objects=objects, background="teal", held_out=False)


def test_one_picture_at_every_size() -> None:
    scene = three_objects()
    large = draw_scene(scene, 1024).astype(np.float64)
    for size in (32, 64, 128, 256, 512):
        step = 1024 // size
        mean = large.reshape(size, step, size, step, 3).mean(axis=(1, 3))
        difference = np.abs(draw_scene(scene, size) - mean)
        assert difference.mean() < 0.1
        # With few samples a pixel, the very tips of a star come out a little lighter.
        most, pixels = (8, 0) if size <= 64 else (24, 24)
        assert (difference.max(axis=2) > most).sum() <= pixels


@pytest.mark.parametrize("size", [64, 333, 1024])
def test_colours_are_exact_inside_and_outside(size: int) -> None:
    scene = three_objects()
    picture = draw_scene(scene, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    covered = np.zeros((size, size))
    for thing in scene.objects:
        mask = shape_mask(thing.shape, size, thing.centre, thing.extent)
        assert (picture[mask == 1] == COLOURS[thing.colour]).all()
        covered += mask
    assert (picture[covered == 0] == BACKGROUNDS["teal"]).all()
    edge = (covered > 0) & (covered < 1)
    assert 0.005 < edge.sum() / size < 40  # smooth edges, one pixel wide
