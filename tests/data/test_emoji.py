"""Artwork: names, phrasings, the held-out side, and what resvg draws, from a small file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diff_dalle.data.emoji import (
    Icon,
    icon_picture,
    licence_of,
    read_icons,
    shuffled,
)
from diff_dalle.errors import UsageError

HALF = '<path fill="#f00" d="M0 0h64v128H0z"/>'  # the left half, red
NAMES = [
    *("red-apple", "grapes", "artist-dark-skin-tone", "artist", "artist-light-skin-tone"),
    *("a-button-blood-type", "flag-south-korea", "letter-q", "keycap", "1", "pinata"),
]


def artwork(folder: Path, **changes: Any) -> Path:
    drawings: dict[str, dict[str, Any]]
    drawings = {name: {"body": HALF + f"<!--{name}-->"} for name in NAMES}
    drawings["same-as-apple"] = drawings["red-apple"]
    drawings["wide"] = {"body": '<path fill="#00f" d="M10 0h20v10H10z"/>', "left": 10, "width": 20}
    drawings["wide"]["height"] = 10
    content = {"prefix": "test", "icons": drawings, "aliases": {"apple": {"parent": "red-apple"}}}
    path = folder / "icons.json"
    path.write_text(json.dumps({**content, "width": 128, "height": 128, **changes}))
    return path


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Icon]:
    path = artwork(tmp_path_factory.mktemp("artwork"))
    return {icon.name: icon for icon in read_icons(path, ["en", "ko", "fr"])}


def test_names_come_from_the_emoji_package(icons: dict[str, Icon]) -> None:
    apple = icons["red-apple"]
    assert apple.emoji == "🍎"
    assert apple.names == {"en": "red apple", "ko": "빨간 사과", "fr": "pomme rouge"}
    assert apple.captions() == [
        *("red apple", "red apple on a white background", "red apple emoji"),
        *("빨간 사과", "흰색 배경의 빨간 사과", "빨간 사과 이모지", "pomme rouge"),
    ]
    assert icons["a-button-blood-type"].emoji == "🅰️"
    assert icons["flag-south-korea"].emoji == "🇰🇷"
    assert icons["pinata"].emoji == "🪅"


def test_an_unknown_icon_goes_by_its_own_name(icons: dict[str, Icon]) -> None:
    # ":+1:" and ":keycap_#:" would become "1" and "keycap": neither is what the icon shows.
    for name in ("letter-q", "keycap", "1"):
        assert icons[name].emoji == ""
        assert icons[name].names == {"en": name.replace("-", " ")}


def test_aliases_are_left_out(icons: dict[str, Icon]) -> None:
    assert "apple" not in icons and len(icons) == len(NAMES) + 2


def test_languages_choose_the_captions(tmp_path: Path) -> None:
    path = artwork(tmp_path)
    (apple, *_) = read_icons(path, ["ko"])
    assert apple.captions()[0] == "빨간 사과" and set(apple.names) == {"ko"}
    with pytest.raises(UsageError, match="--languages xx: choose one or more of en"):
        read_icons(path, ["en", "xx"])


def test_one_icon_in_ten_is_held_out_and_kin_stay_together(tmp_path: Path) -> None:
    tones = ("", "-light-skin-tone", "-medium-dark-skin-tone", "-medium-skin-tone", "-tone3")
    drawings = {
        f"thing-{number}{tone}": {"body": f"<!--{number}{tone}-->"}
        for number in range(1000)
        for tone in tones
    }
    drawings |= {f"copy-{number}": drawings[f"thing-{number}"] for number in range(1000)}
    sides = {
        icon.name: icon.held_out for icon in read_icons(artwork(tmp_path, icons=drawings), ["en"])
    }
    for number in range(1000):
        kin = {sides[f"thing-{number}{tone}"] for tone in tones} | {sides[f"copy-{number}"]}
        assert len(kin) == 1
    assert 0.07 < sum(sides.values()) / len(sides) < 0.13


@pytest.mark.parametrize("size", [32, 64, 200])
def test_drawn_on_white_at_any_size(icons: dict[str, Icon], size: int) -> None:
    picture = icon_picture([icons["red-apple"]], 0, 0).draw(size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert (picture[:, : size // 2] == (255, 0, 0)).all()
    assert (picture[:, size // 2 :] == 255).all()


def test_a_wide_icon_is_centred(icons: dict[str, Icon]) -> None:
    picture = icon_picture([icons["wide"]], 0, 0).draw(64)
    assert (picture[16:48] == (0, 0, 255)).all()
    assert (picture[:16] == 255).all() and (picture[48:] == 255).all()


def test_repeats_are_smaller_and_whole(icons: dict[str, Icon]) -> None:
    square = Icon(
        name="square",
        body='<path d="M0 0h8v8H0z"/>',
        box=(0, 0, 8, 8),
        emoji="",
        names={"en": "square"},
        held_out=False,
    )
    places = set()
    for index in range(1, 30):
        picture = icon_picture([square], 0, index)
        assert 0.75 <= picture.scale <= 1
        rows, columns = np.where(picture.draw(128)[..., 0] < 128)
        side = picture.scale * 128
        assert abs(np.ptp(rows) + 1 - side) <= 1 and abs(np.ptp(columns) + 1 - side) <= 1
        places.add((rows.min(), columns.min()))
        assert picture == icon_picture([square], 0, index) != icon_picture([square], 1, index)
    assert len(places) > 20


def test_the_order_depends_on_the_seed_alone(icons: dict[str, Icon]) -> None:
    forwards, backwards = list(icons.values()), list(icons.values())[::-1]
    assert shuffled(forwards, 0) == shuffled(backwards, 0) != shuffled(forwards, 1)


def test_the_licence_is_read_from_the_package(tmp_path: Path) -> None:
    path = artwork(tmp_path)
    assert licence_of(path) == {"title": "not stated with the artwork"}
    licence = {"title": "Apache 2.0", "spdx": "Apache-2.0"}
    (tmp_path / "info.json").write_text(json.dumps({"license": licence}))
    assert licence_of(path) == licence
    inside = artwork(tmp_path, info={"license": {"title": "MIT"}})
    assert licence_of(inside) == {"title": "MIT"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"icons": {}}', '{"icons": {"a": "b"}}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="x.json"):
        read_icons(path, ["en"])
    with pytest.raises(UsageError, match="no Iconify JSON"):
        read_icons(tmp_path / "missing.json", ["en"])
