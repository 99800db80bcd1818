"""Which scene belongs to (seed, split, index), and what is true of it.

Words of place and relation are read off the geometry by `position_of` and `relation_of`; the
layouts below are drawn until these give exactly one answer, so no caption is ambiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diff_dalle.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, SceneObject
from diff_dalle.keyed_noise import key_of, uniform

TRAIN, VAL = "train", "val"
POSITIONS = ("left", "right", "top", "bottom", "centre")  # of the object in a one-object scene
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))

_ONE, _TWO = 0.5, 0.8  # shares of scenes: one object 0.5, two 0.3, three 0.2
_HELD_OUT_SHARE = 0.5  # of the one-object scenes of the validation split
_HELD_OUT_EVERY = 8
_MARGIN = 0.03  # between an object and the picture's edge
_GAP = 0.04  # at least so much between two objects
_CENTRAL = 0.06  # how far from the middle the centre of a "centre" object may lie
_ASIDE = 0.15  # how far from it, at least, the centre of a "left" object lies
_DOMINANT = 1.25  # a relation's direction outweighs the other one by this factor

Point = tuple[float, float]


def held_out(shape: str, colour: str, background: str) -> bool:
    """Whether training never shows this shape in this colour on this background.

    One triple in eight, 48 of 384, spread like a Latin square: every pair of shape and colour
    misses one background, every pair of shape and background one colour.
    """
    places = (
        SHAPES.index(shape),
        list(COLOURS).index(colour),
        list(BACKGROUNDS).index(background),
    )
    return sum(places) % _HELD_OUT_EVERY == 0


def sample_scene(seed: int, index: int, split: str = TRAIN) -> Scene:
    """The scene of (seed, split, index), the same on every machine.

    Args:
        seed: of the data set.
        index: of the sample in its split.
        split: "train" shows no held-out triple in any scene; in "val" about half of the
            one-object scenes are held out, and other scenes contain what chance gives.
    """
    draws = _Draws(key_of("shapes", seed, split, index))
    count = draws.number()
    wanted = split == VAL and draws.number() < _HELD_OUT_SHARE
    while True:
        scene = _one(draws) if count < _ONE else _several(draws, 2 if count < _TWO else 3)
        if scene is None:
            continue
        fits = scene.held_out == wanted if len(scene.objects) == 1 else True
        if fits and not (split == TRAIN and scene.held_out):
            return scene


def one_object_scenes(n: int, seed: int, *, held_out_only: bool) -> list[Scene]:
    """Scenes for measuring a model: n different combinations, drawn evenly.

    Args:
        n: at most 480 held-out or 3,360 other combinations of shape, colour, background, size
            and position exist; a larger n repeats them.
        seed: of the choice.
        held_out_only: take the combinations that training never sees, or only others.
    """
    combinations = [
        (shape, colour, background, size, position)
        for shape, colour, background, size, position in itertools.product(
            SHAPES, COLOURS, BACKGROUNDS, SIZES, POSITIONS
        )
        if held_out(shape, colour, background) == held_out_only
    ]
    combinations.sort(key=lambda words: key_of("captions", seed, *words))
    chosen = itertools.islice(itertools.cycle(combinations), n)
    scenes = []
    for index, (shape, colour, background, size, position) in enumerate(chosen):
        draws = _Draws(key_of("captions", seed, index))
        look = _Look(shape, colour, size, _extent(size, draws.number()))
        scenes.append(_scene([(look, _place(look.extent, position, draws))], background))
    return scenes


def position_of(thing: SceneObject) -> str | None:
    """One of `POSITIONS`, or None for an object that no word of them fits."""
    right, down = thing.centre[0] - 0.5, thing.centre[1] - 0.5
    if max(abs(right), abs(down)) <= _CENTRAL:
        return "centre"
    if abs(right) >= _ASIDE and abs(down) <= _CENTRAL:
        return "right" if right > 0 else "left"
    if abs(down) >= _ASIDE and abs(right) <= _CENTRAL:
        return "bottom" if down > 0 else "top"
    return None


def relation_of(first: SceneObject, second: SceneObject) -> str | None:
    """One of `RELATIONS` that puts ``first`` before ``second``, or None if none is plain.

    The boxes must lie apart in that direction, and the distance between the centres must lie
    mostly along it.
    """
    right = second.centre[0] - first.centre[0]
    down = second.centre[1] - first.centre[1]
    apart = (first.extent + second.extent) / 2
    if abs(right) > apart and abs(right) >= _DOMINANT * abs(down):
        return "left of" if right > 0 else "right of"
    if abs(down) > apart and abs(down) >= _DOMINANT * abs(right):
        return "above" if down > 0 else "below"
    return None


@dataclass(frozen=True)
class _Look:
    shape: str
    colour: str
    size: str
    extent: float


class _Draws:
    """Uniform numbers of one key, as many as asked for."""

    def __init__(self, key: int) -> None:
        self._numbers = self._sequence(torch.tensor([key]))

    def number(self) -> float:
        return next(self._numbers)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.number()

    def choice(self, words: tuple[str, ...]) -> str:
        return words[int(self.number() * len(words))]

    @staticmethod
    def _sequence(key: torch.Tensor) -> Iterator[float]:
        for stream in itertools.count():
            yield from uniform(key, (256,), stream)[0].tolist()


def _one(draws: _Draws) -> Scene:
    look = _look(draws)
    place = _place(look.extent, draws.choice(POSITIONS), draws)
    return _scene([(look, place)], draws.choice(tuple(BACKGROUNDS)))


def _several(draws: _Draws, count: int) -> Scene | None:
    """A pair along one axis and perhaps a third object across it; None if it came out unclear."""
    looks = [_look(draws) for _ in range(count)]
    if len({(look.colour, look.shape) for look in looks}) < count:
        return None
    background = draws.choice(tuple(BACKGROUNDS))
    relation = draws.choice(RELATIONS)
    along = _in_line([looks[0].extent, looks[1].extent], draws)
    if count == 2:
        across = [draws.between(0.42, 0.58) for _ in looks]
    else:
        band = max(looks[0].extent, looks[1].extent)
        pair, third = _in_line([band, looks[2].extent], draws)
        if draws.number() < 0.5:
            pair, third = 1 - pair, 1 - third
        along, across = [*along, draws.between(0.42, 0.58)], [pair, pair, third]
    if relation in ("right of", "below"):
        along = [1 - place for place in along]
    flat = relation in ("left of", "right of")
    places = list(zip(along, across, strict=True) if flat else zip(across, along, strict=True))
    scene = _scene(list(zip(looks, places, strict=True)), background)
    return scene if _is_clear(scene, relation) else None


def _is_clear(scene: Scene, relation: str) -> bool:
    """Whether the pair stands as asked, and to the third object in one and the same relation."""
    first, second, *rest = scene.objects
    if relation_of(first, second) != relation:
        return False
    return all(relation_of(first, o) == relation_of(second, o) is not None for o in rest)


def _look(draws: _Draws) -> _Look:
    size = draws.choice(tuple(SIZES))
    shape, colour = draws.choice(SHAPES), draws.choice(tuple(COLOURS))
    return _Look(shape, colour, size, _extent(size, draws.number()))


def _extent(size: str, number: float) -> float:
    low, high = SIZES[size]
    return low + (high - low) * number


def _place(extent: float, position: str, draws: _Draws) -> Point:
    """A centre for which `position_of` says ``position``."""
    jitter = (draws.between(-0.05, 0.05), draws.between(-0.05, 0.05))
    if position == "centre":
        return 0.5 + jitter[0], 0.5 + jitter[1]
    reach = 0.5 - extent / 2 - _MARGIN - draws.between(0, 0.06)  # from the middle
    if position in ("left", "right"):
        return 0.5 + (reach if position == "right" else -reach), 0.5 + jitter[1]
    return 0.5 + jitter[0], 0.5 + (reach if position == "bottom" else -reach)


def _in_line(extents: list[float], draws: _Draws) -> list[float]:
    """Centres of two objects along one axis, the free room shared out at random."""
    free = 1 - 2 * _MARGIN - _GAP - sum(extents)
    cuts = sorted((draws.number(), draws.number()))
    first = _MARGIN + cuts[0] * free + extents[0] / 2
    second = 1 - _MARGIN - (1 - cuts[1]) * free - extents[1] / 2
    return [first, second]


def _scene(objects: list[tuple[_Look, Point]], background: str) -> Scene:
    """Geometry is rounded, so that what the JSON says is exactly what is drawn."""
    things = tuple(
        SceneObject(
            shape=look.shape,
            colour=look.colour,
            size=look.size,
            centre=(round(place[0], 4), round(place[1], 4)),
            extent=round(look.extent, 4),
        )
        for look, place in objects
    )
    withheld = any(held_out(o.shape, o.colour, background) for o in things)
    return Scene(objects=things, background=background, held_out=withheld)
