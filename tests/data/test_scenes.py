"""Which scene comes when: reproducible, balanced, inside the picture, held-out ones kept out."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from diff_dalle.data.scenes import (
    POSITIONS,
    RELATIONS,
    held_out,
    one_object_scenes,
    position_of,
    relation_of,
    sample_scene,
)
from diff_dalle.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    shape_mask,
)

COUNT = 2000


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return [sample_scene(0, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def val() -> list[Scene]:
    return [sample_scene(0, index, "val") for index in range(COUNT // 2)]


def test_a_scene_is_the_same_on_every_machine() -> None:
    (thing,) = sample_scene(0, 0).objects
    assert (thing.shape, thing.colour, thing.size) == ("star", "purple", "large")
    assert (thing.centre, thing.extent) == ((0.4509, 0.5281), 0.4049)


def test_seed_split_and_index_each_matter() -> None:
    scenes = [sample_scene(0, 5), sample_scene(1, 5), sample_scene(0, 6), sample_scene(0, 5, "val")]
    assert all(a != b for a, b in itertools.combinations(scenes, 2))
    assert sample_scene(0, 5) == scenes[0]


def test_held_out_triples_are_spread_evenly() -> None:
    triples = [t for t in itertools.product(SHAPES, COLOURS, BACKGROUNDS) if held_out(*t)]
    assert len(triples) == 48
    assert set(Counter((shape, colour) for shape, colour, _ in triples).values()) == {1}
    assert len({(shape, colour) for shape, colour, _ in triples}) == 48
    assert len({(shape, ground) for shape, _, ground in triples}) == 48
    assert ("circle", "red", "white") in triples  # the list is part of the data's definition


def test_training_never_shows_a_held_out_triple(train: list[Scene]) -> None:
    for scene in train:
        assert not scene.held_out
        assert not any(held_out(o.shape, o.colour, scene.background) for o in scene.objects)
    one = {(s.objects[0].shape, s.objects[0].colour, s.background) for s in train if is_one(s)}
    assert len(one) > 300  # of 336


def test_validation_has_seen_and_held_out_scenes(val: list[Scene]) -> None:
    for scene in val:
        truth = any(held_out(o.shape, o.colour, scene.background) for o in scene.objects)
        assert scene.held_out == truth
    ones = [scene.held_out for scene in val if is_one(scene)]
    assert 0.42 < sum(ones) / len(ones) < 0.58


def is_one(scene: Scene) -> bool:
    return len(scene.objects) == 1


def test_shares_of_everything(train: list[Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in train)
    assert counts[1] / COUNT == pytest.approx(0.5, abs=0.04)
    assert counts[2] / COUNT == pytest.approx(0.3, abs=0.04)
    ones = [scene.objects[0] for scene in train if is_one(scene)]
    for attribute, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        shares = Counter(getattr(thing, attribute) for thing in ones)
        assert set(shares) == set(words)
        assert min(shares.values()) > 0.7 * len(ones) / len(words)
    positions = Counter(map(position_of, ones))
    assert set(positions) == set(POSITIONS)
    relations = Counter(relation_of(*s.objects) for s in train if len(s.objects) == 2)
    assert set(relations) == set(RELATIONS)


def test_objects_lie_inside_and_apart(train: list[Scene], val: list[Scene]) -> None:
    for scene in train + val:
        assert len({(o.shape, o.colour) for o in scene.objects}) == len(scene.objects)
        for o in scene.objects:
            low, high = SIZES[o.size]
            assert low <= o.extent <= high
            assert all(o.extent / 2 + 0.0299 <= c <= 1 - o.extent / 2 - 0.0299 for c in o.centre)
        for a, b in itertools.combinations(scene.objects, 2):
            gaps = [abs(p - q) for p, q in zip(a.centre, b.centre, strict=True)]
            assert max(gaps) - (a.extent + b.extent) / 2 >= 0.0398


def test_words_agree_with_the_pixels(train: list[Scene]) -> None:
    def middle(thing: SceneObject) -> tuple[float, float, float, float]:
        rows, columns = np.where(shape_mask(thing.shape, 128, thing.centre, thing.extent) > 0.5)
        return columns.min() / 128, columns.max() / 128, rows.min() / 128, rows.max() / 128

    for scene in train[:150]:
        left, right, top, bottom = middle(scene.objects[0])
        if is_one(scene):
            across, down = (left + right) / 2 - 0.5, (top + bottom) / 2 - 0.5
            word = "right" if across > 0.1 else "left" if across < -0.1 else ""
            word += "bottom" if down > 0.1 else "top" if down < -0.1 else ""
            assert position_of(scene.objects[0]) == (word or "centre")
            continue
        for other in scene.objects[1:]:
            left_2, right_2, top_2, bottom_2 = middle(other)
            apart = {
                "left of": right < left_2,
                "right of": right_2 < left,
                "above": bottom < top_2,
                "below": bottom_2 < top,
            }
            assert apart[str(relation_of(scene.objects[0], other))]


def test_no_word_for_what_is_in_between() -> None:
    def at(x: float, y: float) -> SceneObject:
        return SceneObject(shape="star", colour="red", size="small", centre=(x, y), extent=0.25)

    assert position_of(at(0.4, 0.5)) is None
    assert position_of(at(0.2, 0.2)) is None
    assert relation_of(at(0.2, 0.2), at(0.8, 0.8)) is None
    assert relation_of(at(0.4, 0.5), at(0.6, 0.5)) is None  # they overlap


def test_scenes_to_measure_a_model_with() -> None:
    scenes = one_object_scenes(256, 0, held_out_only=True)
    assert scenes == one_object_scenes(256, 0, held_out_only=True)
    assert scenes != one_object_scenes(256, 1, held_out_only=True)
    assert scenes[:100] == one_object_scenes(100, 0, held_out_only=True)
    assert all(scene.held_out and is_one(scene) for scene in scenes)
    kinds = {
        (o.shape, o.colour, scene.background, o.size, position_of(o))
        for scene in scenes
        for o in scene.objects
    }
    assert len(kinds) == 256 and {kind[4] for kind in kinds} == set(POSITIONS)
    triples = Counter(kind[:3] for kind in kinds)
    assert len(triples) == 48 and max(triples.values()) <= 10
    assert not any(s.held_out for s in one_object_scenes(500, 0, held_out_only=False))
    assert len(one_object_scenes(481, 0, held_out_only=True)) == 481
