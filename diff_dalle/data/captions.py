"""What can be said about a scene, in English and in Korean.

Every caption is true and points at one thing only. Captions differ in detail: the first, in
English, names size, colour, shape, place or relation, and background; others leave some out.
"""

from __future__ import annotations

from diff_dalle.data.scenes import OPPOSITE, one_object_scenes, position_of, relation_of
from diff_dalle.data.shapes import Scene, SceneObject

_PLACE = {
    "left": "at the left of",
    "right": "at the right of",
    "top": "at the top of",
    "bottom": "at the bottom of",
    "centre": "in the centre of",
}

_KO_COLOUR = {
    "red": "빨간",
    "orange": "주황색",
    "yellow": "노란",
    "green": "초록색",
    "blue": "파란",
    "purple": "보라색",
    "pink": "분홍색",
    "brown": "갈색",
}
_KO_BACKGROUND = {
    "white": "흰색",
    "black": "검은색",
    "grey": "회색",
    "beige": "베이지색",
    "navy": "남색",
    "teal": "청록색",
    "sky blue": "하늘색",
    "mint": "민트색",
}
_KO_SHAPE = {
    "circle": "원",
    "square": "정사각형",
    "triangle": "삼각형",
    "star": "별",
    "cross": "십자가",
    "ring": "고리",
}
_KO_PLAIN_SHAPE = {**_KO_SHAPE, "circle": "동그라미", "square": "네모", "triangle": "세모"}
_KO_SIZE = {"small": "작은", "large": "큰"}
_KO_PLACE = {
    "left": "왼쪽",
    "right": "오른쪽",
    "top": "위쪽",
    "bottom": "아래쪽",
    "centre": "가운데",
}
_KO_RELATION = {"left of": "왼쪽", "right of": "오른쪽", "above": "위", "below": "아래"}


def captions(scene: Scene) -> list[str]:
    """All captions of a scene, the full English one first, English before Korean."""
    write = {1: _of_one, 2: _of_two, 3: _of_three}[len(scene.objects)]
    return write(scene)


def one_object_captions(n: int, seed: int, *, held_out: bool = True) -> list[tuple[str, Scene]]:
    """Full captions of one-object scenes, each with its ground truth, to measure a model with.

    Args:
        n: how many; see `scenes.one_object_scenes`.
        seed: of the choice.
        held_out: take combinations of shape, colour and background that training never sees,
            or only others.
    Returns:
        (caption, scene): the truth is ``scene.objects[0]`` and ``scene.background``.
    """
    scenes = one_object_scenes(n, seed, held_out_only=held_out)
    return [(captions(scene)[0], scene) for scene in scenes]


def _of_one(scene: Scene) -> list[str]:
    (thing,) = scene.objects
    position = position_of(thing)
    if position is None:
        raise ValueError(f"no word of position fits the object at {thing.centre}")
    place, ground = _PLACE[position], f"a {scene.background} background"
    ko_place, ko_ground = _KO_PLACE[position], f"{_KO_BACKGROUND[scene.background]} 배경"
    return [
        f"{_full(thing)} {place} {ground}",
        f"{_full(thing)} on {ground}",
        f"{_brief(thing)} on {ground}",
        f"{ground} with {_full(thing)} {place.removesuffix(' of')}",
        f"{_brief(thing)} {place} the picture",
        _full(thing),
        f"{ko_ground} {ko_place}에 있는 {_ko_full(thing)}",
        f"{ko_ground}에 그려진 {_ko_full(thing)}",
        f"{ko_place}에 {_ko_subject(_ko_plain(thing))} 있는 그림",
        f"{ko_ground}의 {_ko_brief(thing)}",
    ]


def _of_two(scene: Scene) -> list[str]:
    a, b = scene.objects
    relation = _certain(a, b)
    ground = f"on a {scene.background} background"
    ko_ground = f"{_KO_BACKGROUND[scene.background]} 배경"
    ko, ko_back = _KO_RELATION[relation], _KO_RELATION[OPPOSITE[relation]]
    return [
        f"{_full(a)} {relation} {_full(b)} {ground}",
        f"{_full(a)} {relation} {_full(b)}",
        f"{_brief(a)} {relation} {_brief(b)}",
        f"{_full(b)} {OPPOSITE[relation]} {_full(a)} {ground}",
        f"{_brief(b)} {OPPOSITE[relation]} {_brief(a)}",
        f"{_brief(a)} and {_brief(b)} {ground}",
        f"{ko_ground}에서 {_ko_full(b)} {ko}에 있는 {_ko_full(a)}",
        f"{_ko_brief(b)} {ko}의 {_ko_brief(a)}",
        f"{_ko_plain(a)} {ko_back}에 {_ko_subject(_ko_plain(b))} 있는 그림",
        f"{ko_ground}의 {_ko_and(_ko_brief(a))} {_ko_brief(b)}",
    ]


def _of_three(scene: Scene) -> list[str]:
    a, b, c = scene.objects
    pair, third = _certain(a, b), _certain(a, c)
    ground = f"on a {scene.background} background"
    ko_ground = f"{_KO_BACKGROUND[scene.background]} 배경"
    ko, ko_both = _KO_RELATION[pair], _KO_RELATION[third]
    ko_third = _KO_RELATION[OPPOSITE[third]]
    return [
        f"{_full(a)} {pair} {_full(b)}, both {third} {_full(c)}, {ground}",
        f"{_brief(a)} {pair} {_brief(b)}, both {third} {_brief(c)}",
        f"{_full(c)} {OPPOSITE[third]} both {_full(a)} and {_full(b)}",
        f"{_brief(b)} {OPPOSITE[pair]} {_brief(a)}, both {third} {_brief(c)}, {ground}",
        f"{_brief(a)}, {_brief(b)} and {_brief(c)} {ground}",
        f"{ko_ground}에서 {_ko_subject(_ko_full(a))} {_ko_full(b)} {ko}에 있고, "
        f"둘 다 {_ko_full(c)} {ko_both}에 있는 그림",
        f"{_ko_and(_ko_brief(a))} {_ko_subject(_ko_brief(b))} 있고, "
        f"그 {ko_third}에 {_ko_subject(_ko_brief(c))} 있는 그림",
        f"{ko_ground}의 {_ko_brief(a)}, {_ko_brief(b)}, {_ko_brief(c)}",
    ]


def _certain(first: SceneObject, second: SceneObject) -> str:
    relation = relation_of(first, second)
    if relation is None:
        raise ValueError(f"no relation is plain between {first} and {second}")
    return relation


def _full(thing: SceneObject) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _brief(thing: SceneObject) -> str:
    article = "an" if thing.colour[0] in "aeiou" else "a"
    return f"{article} {thing.colour} {thing.shape}"


def _ko_full(thing: SceneObject) -> str:
    return f"{_KO_SIZE[thing.size]} {_ko_brief(thing)}"


def _ko_brief(thing: SceneObject) -> str:
    return f"{_KO_COLOUR[thing.colour]} {_KO_SHAPE[thing.shape]}"


def _ko_plain(thing: SceneObject) -> str:
    """As in talk: 동그라미 for 원."""
    return f"{_KO_COLOUR[thing.colour]} {_KO_PLAIN_SHAPE[thing.shape]}"


def _ko_subject(noun: str) -> str:
    """With the particle 이 after a final consonant, 가 after a vowel."""
    return noun + ("이" if _ends_in_consonant(noun) else "가")


def _ko_and(noun: str) -> str:
    """With the particle 과 after a final consonant, 와 after a vowel."""
    return noun + ("과" if _ends_in_consonant(noun) else "와")


def _ends_in_consonant(word: str) -> bool:
    # Unicode lists Hangul syllables from 가 on, 28 endings each, the open one first.
    return (ord(word[-1]) - ord("가")) % 28 != 0
