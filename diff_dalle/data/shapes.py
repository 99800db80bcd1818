"""What a demo scene is made of, and how it is drawn: shapes with exact edges at any size.

Geometry lives in unit coordinates: (0, 0) is the top left corner of the picture, (1, 1) the
bottom right one, x to the right and y downwards. A shape is a signed distance to its outline
(negative inside; the construction is Quilez's, "2D distance functions"), so a scene is the same
picture at 64 and at 1024 pixels.

Notation: H W pixels, S pixels of a square picture's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Colour = tuple[int, int, int]

# No background has a colour of an object; the closest two of all sixteen lie 80 levels apart.
COLOURS: dict[str, Colour] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (250, 230, 50),
    "green": (40, 165, 55),
    "blue": (30, 95, 240),
    "purple": (135, 35, 165),
    "pink": (250, 125, 190),
    "brown": (125, 70, 30),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "grey": (140, 140, 140),
    "beige": (230, 205, 150),
    "navy": (20, 25, 105),
    "teal": (0, 125, 125),
    "sky blue": (140, 200, 255),
    "mint": (165, 245, 185),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
# The range of an object's extent (side of its bounding box) for each word of size.
SIZES: dict[str, tuple[float, float]] = {"small": (0.24, 0.28), "large": (0.40, 0.45)}

_RING_HOLE = 0.55  # inner radius over outer radius
_CROSS_ARM = 0.34  # width of an arm over the extent
_SMOOTHED_BELOW = 512  # pixels: smaller pictures average several samples a pixel


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object, in unit coordinates.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: one of `SIZES`.
        centre: (x, y) of the middle of its bounding box.
        extent: side of its bounding box, which every shape fills.
    """

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    extent: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three objects that do not touch, on a plain background.

    Attributes:
        objects: in the order in which the full caption names them.
        background: one of `BACKGROUNDS`.
        held_out: whether the scene shows a combination that training never sees.
    """

    objects: tuple[SceneObject, ...]
    background: str
    held_out: bool

    def draw(self, size: int) -> NDArray[np.uint8]:
        """The picture, [S,S,3]; see `draw_scene`."""
        return draw_scene(self, size)

    def truth(self) -> dict[str, Any]:
        """Everything above as JSON values."""
        return asdict(self)


def draw_scene(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The picture of a scene.

    Args:
        scene: what to draw.
        size: pixels of the side, S.
    Returns:
        RGB [S,S,3]; edges are blended in the values as they are stored, so the mean over a block
        of pixels is what the smaller picture holds there.
    """
    picture = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    for thing in scene.objects:
        columns, rows = (_span(middle, thing.extent, size) for middle in thing.centre)
        cover = _coverage(thing.shape, size, thing.centre, thing.extent, rows, columns)  # [H,W]
        mask = Image.fromarray(np.rint(cover * 255).astype(np.uint8))
        picture.paste(COLOURS[thing.colour], (columns.start, rows.start), mask)
    return np.array(picture)


def shape_mask(shape: str, size: int, centre: tuple[float, float], extent: float) -> Array:
    """How much of each pixel a shape covers, [S,S] in [0, 1].

    Args:
        shape: one of `SHAPES`.
        size: pixels of the picture's side, S.
        centre: (x, y) of the middle of the bounding box, unit coordinates.
        extent: side of the bounding box as a fraction of the picture's side.
    """
    return _coverage(shape, size, centre, extent, slice(0, size), slice(0, size))


def _span(middle: float, extent: float, size: int) -> slice:
    """The pixels that an object can touch along one axis."""
    first = math.floor((middle - extent / 2) * size) - 1
    last = math.ceil((middle + extent / 2) * size) + 1
    return slice(max(first, 0), min(last, size))


def _coverage(
    shape: str, size: int, centre: tuple[float, float], extent: float, rows: slice, columns: slice
) -> Array:
    """Coverage [H,W] of the pixels in some rows and columns.

    A pixel whose centre lies d pixels outside the outline is covered by about 1/2 - d. That is
    exact at straight edges; at corners of small pictures, several samples a pixel make it so.
    """
    samples = max(1, _SMOOTHED_BELOW // size)  # along each axis
    half = extent / 2
    x = (_positions(columns, size, samples) - centre[0]) / half  # [W*samples]
    y = (_positions(rows, size, samples) - centre[1]) / half  # [H*samples]
    distance = _DISTANCES[shape](x.astype(np.float32)[None, :], y.astype(np.float32)[:, None])
    cover = np.clip(0.5 - distance * np.float32(half * size * samples), 0, 1)
    if samples == 1:
        return cover
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return cover.reshape(height, samples, width, samples).mean(axis=(1, 3))


def _positions(pixels: slice, size: int, samples: int) -> NDArray[np.float64]:
    """Unit coordinates of the sample points of some pixels."""
    return (np.arange(pixels.start * samples, pixels.stop * samples) + 0.5) / (size * samples)


# Signed distances. The bounding box is [-1, 1] x [-1, 1]; x is [1,W], y is [H,1].


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1


def _ring(x: Array, y: Array) -> Array:
    radius = np.sqrt(x * x + y * y)
    middle, half_width = (1 + _RING_HOLE) / 2, (1 - _RING_HOLE) / 2
    return np.abs(radius - np.float32(middle)) - np.float32(half_width)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) - 1, np.abs(y) - 1)


def _cross(x: Array, y: Array) -> Array:
    upright = np.maximum(np.abs(x) - _CROSS_ARM, np.abs(y) - 1)
    lying = np.maximum(np.abs(x) - 1, np.abs(y) - _CROSS_ARM)
    return np.minimum(upright, lying)


def _triangle(x: Array, y: Array) -> Array:
    # Tip (0, -1), foot from (-1, 1) to (1, 1); the flanks fall 2 for every 1 they go outwards.
    flanks = np.float32(1 / math.sqrt(5)) * (2 * np.abs(x) - y - 1)
    return np.maximum(flanks, y - 1)


def _star(x: Array, y: Array) -> Array:
    """Five lines, each through two tips with one tip between; inside at least four of them."""
    shape = np.broadcast_shapes(x.shape, y.shape)
    largest = np.full(shape, -np.inf, dtype=np.float32)
    second = largest
    for normal_x, normal_y, offset in _STAR_LINES:
        distance = np.float32(normal_x) * x + np.float32(normal_y) * y - np.float32(offset)
        second = np.maximum(second, np.minimum(largest, distance))
        largest = np.maximum(largest, distance)
    return second


def _star_lines() -> list[tuple[float, float, float]]:
    """(normal x, normal y, offset) of the lines of a pentagram stretched to fill its box."""
    angles = [2 * math.pi * tip / 5 for tip in range(5)]  # from the top, clockwise
    width, top, bottom = math.sin(angles[1]), 1.0, -math.cos(angles[2])
    tips = [
        (math.sin(a) / width, (top - bottom - 2 * math.cos(a)) / (top + bottom)) for a in angles
    ]
    lines = []
    for tip in range(5):
        (x_1, y_1), (x_2, y_2) = tips[tip], tips[(tip + 2) % 5]
        length = math.hypot(x_2 - x_1, y_2 - y_1)
        normal = ((y_1 - y_2) / length, (x_2 - x_1) / length)
        offset = normal[0] * x_1 + normal[1] * y_1
        outwards = 1 if offset > 0 else -1
        lines.append((outwards * normal[0], outwards * normal[1], outwards * offset))
    return lines


_STAR_LINES = _star_lines()
_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
