"""Every caption is true and plain: an independent reader checks it against the geometry."""

from __future__ import annotations

import re

import pytest

from diff_dalle.data.captions import captions, one_object_captions
from diff_dalle.data.scenes import held_out, sample_scene
from diff_dalle.data.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject
from diff_dalle.data.tokenizer import Tokenizer

SCENES = [sample_scene(3, index) for index in range(600)]

KO_COLOURS = dict(
    zip("빨간 주황색 노란 초록색 파란 보라색 분홍색 갈색".split(), COLOURS, strict=True)
)
KO_SHAPES = {
    **dict(zip("원 정사각형 삼각형 별 십자가 고리".split(), SHAPES, strict=True)),
    **{"동그라미": "circle", "네모": "square", "세모": "triangle"},
}
KO_SIZES = {"큰": "large", "작은": "small"}
KO_GROUNDS = dict(
    zip("흰색 검은색 회색 베이지색 남색 청록색 하늘색 민트색".split(), BACKGROUNDS, strict=True)
)

THING = re.compile(
    rf"(?:an?) (?:(large|small) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?![a-z])"
)
KO_THING = re.compile(rf"(?:(큰|작은) )?({'|'.join(KO_COLOURS)}) ({'|'.join(KO_SHAPES)})")


def thing(shape: str, colour: str, size: str, x: float, y: float) -> SceneObject:
    extent = 0.42 if size == "large" else 0.25
    return SceneObject(shape=shape, colour=colour, size=size, centre=(x, y), extent=extent)


def scene(background: str, *objects: SceneObject) -> Scene:
    return Scene(objects=objects, background=background, held_out=False)


ONE = scene("white", thing("circle", "orange", "large", 0.26, 0.5))
TWO = scene(
    "black", thing("star", "red", "small", 0.5, 0.2), thing("ring", "blue", "large", 0.5, 0.7)
)
THREE = scene(
    "sky blue",
    thing("square", "green", "small", 0.2, 0.2),
    thing("cross", "pink", "small", 0.7, 0.2),
    thing("triangle", "brown", "large", 0.5, 0.7),
)


def test_captions_word_for_word() -> None:
    one, two, three = captions(ONE), captions(TWO), captions(THREE)
    assert one[0] == "a large orange circle at the left of a white background"
    assert "an orange circle on a white background" in one
    assert "흰색 배경 왼쪽에 있는 큰 주황색 원" in one
    assert "왼쪽에 주황색 동그라미가 있는 그림" in one
    assert two[0] == "a small red star above a large blue ring on a black background"
    assert "a blue ring below a red star" in two
    assert "검은색 배경에서 큰 파란 고리 위에 있는 작은 빨간 별" in two
    assert "파란 고리 위의 빨간 별" in two
    assert "빨간 별 아래에 파란 고리가 있는 그림" in two
    assert "검은색 배경의 빨간 별과 파란 고리" in two
    assert three[0] == (
        "a small green square left of a small pink cross, both above a large brown triangle, "
        "on a sky blue background"
    )
    assert "a large brown triangle below both a small green square and a small pink cross" in three
    assert (
        "하늘색 배경에서 작은 초록색 정사각형이 작은 분홍색 십자가 왼쪽에 있고, "
        "둘 다 큰 갈색 삼각형 위에 있는 그림" in three
    )
    assert "초록색 정사각형과 분홍색 십자가가 있고, 그 아래에 갈색 삼각형이 있는 그림" in three


def find(picture: Scene, shape: str, colour: str, size: str | None) -> SceneObject:
    """The one object that fits the words; fails if none or several do."""
    fitting = [
        o
        for o in picture.objects
        if (o.shape, o.colour) == (shape, colour) and size in (None, "", o.size)
    ]
    assert len(fitting) == 1
    return fitting[0]


def stands(a: SceneObject, relation: str, b: SceneObject) -> bool:
    apart = (a.extent + b.extent) / 2
    right, down = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    along = {"left of": right, "right of": -right, "above": down, "below": -down}[relation]
    return along > apart and along > max(abs(right), abs(down)) * 0.99


def lies(o: SceneObject, place: str) -> bool:
    across, down = o.centre[0] - 0.5, o.centre[1] - 0.5
    central = max(abs(across), abs(down)) < 0.07
    amounts = {"left": -across, "right": across, "top": -down, "bottom": down}
    if place == "centre":
        return central
    return not central and amounts[place] == max(amounts.values())


def test_english_captions_are_true() -> None:
    relations = places = grounds = 0
    for picture in SCENES:
        for text in filter(str.isascii, captions(picture)):
            found = [find(picture, m[3], m[2], m[1]) for m in THING.finditer(text)]
            assert len(found) == len(picture.objects)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
            for ground in re.findall(r"\ba ((?:\w+ )?\w+) background", text):
                assert ground == picture.background
                grounds += 1
            relation = re.search(r"(left of|right of|above|below) an? ", text)
            if relation and len(found) > 1:  # "at the left of a white background" is none
                assert stands(found[0], relation[1], found[1])
                relations += 1
            if both := re.search(r"both (left of|right of|above|below) an? ", text):
                assert all(stands(o, both[1], found[2]) for o in found[:2])
                relations += 1
            if third := re.search(r"(left of|right of|above|below) both ", text):
                assert all(stands(found[0], third[1], o) for o in found[1:])
                relations += 1
            if place := re.search(r"(?:at|in) the (left|right|top|bottom|centre)", text):
                assert lies(found[0], place[1])
                places += 1
    assert min(relations, places, grounds) > 500


def test_korean_captions_are_true() -> None:
    words = {"왼쪽": "left of", "오른쪽": "right of", "위": "above", "아래": "below"}
    sides = {"왼쪽": "left", "오른쪽": "right", "위쪽": "top", "아래쪽": "bottom"}
    relations = 0
    for picture in SCENES:
        for text in captions(picture):
            if text.isascii():
                continue
            things = list(KO_THING.finditer(text))
            found = [
                find(picture, KO_SHAPES[m[3]], KO_COLOURS[m[2]], KO_SIZES.get(m[1])) for m in things
            ]
            assert len(found) == len(picture.objects)
            if ground := re.search(r"(\S+색) 배경", text):
                assert KO_GROUNDS[ground[1]] == picture.background
            if len(found) == 1:
                place = re.search(r"(왼쪽|오른쪽|위쪽|아래쪽|가운데)에", text)
                assert not place or lies(found[0], sides.get(place[1], "centre"))
            if len(found) == 2 and (m := re.search(r" (왼쪽|오른쪽|위|아래)(에|의) ", text)):
                # "B 위의 A": what stands before the word is what the other is seen from.
                assert stands(found[1], words[m[1]], found[0])
                relations += 1
            if m := re.search(r" (\S+)에 있고, 둘 다 .* (\S+)에 있는 그림", text):
                assert stands(found[0], words[m[1]], found[1])
                assert all(stands(o, words[m[2]], found[2]) for o in found[:2])
                relations += 1
            if m := re.search(r"있고, 그 (\S+)에 ", text):
                assert all(stands(found[2], words[m[1]], o) for o in found[:2])
                relations += 1
    assert relations > 500


def test_korean_particles() -> None:
    closed = ("원", "정사각형", "삼각형", "별")
    text = "\n".join(line for picture in SCENES for line in captions(picture))
    for shape in (*KO_SHAPES,):
        after = set(re.findall(rf"{shape}(이|가|과|와)(?= )", text))
        assert after <= ({"이", "과"} if shape in closed else {"가", "와"})
        assert after
    assert "  " not in text


def test_the_first_caption_names_everything() -> None:
    for picture in SCENES:
        first = captions(picture)[0]
        assert first.isascii()
        assert first.endswith(f"a {picture.background} background")
        assert all(f"{o.size} {o.colour} {o.shape}" in first for o in picture.objects)
        assert len(set(captions(picture))) == len(captions(picture)) >= 8


def test_captions_fit_the_default_text_length() -> None:
    lines = [line for picture in SCENES for line in captions(picture)]
    assert max(Tokenizer.train(lines).lengths(lines)) <= 48


def test_captions_to_measure_a_model_with() -> None:
    pairs = one_object_captions(256, 0)
    assert len({caption for caption, _ in pairs}) == 256
    for caption, truth in pairs:
        (o,) = truth.objects
        assert held_out(o.shape, o.colour, truth.background)
        assert caption.startswith(f"a {o.size} {o.colour} {o.shape} ")
        assert caption.endswith(f" of a {truth.background} background")
    seen = one_object_captions(64, 0, held_out=False)
    assert not any(truth.held_out for _, truth in seen)


def test_what_has_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no word of position"):
        captions(scene("white", thing("star", "red", "small", 0.2, 0.2)))
    crossed = [thing("star", "red", "small", 0.2, 0.2), thing("ring", "red", "small", 0.8, 0.8)]
    with pytest.raises(ValueError, match="no relation is plain"):
        captions(scene("white", *crossed))
