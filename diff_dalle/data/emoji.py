"""Emoji artwork as captioned pictures: Iconify JSON drawn by resvg, named by the `emoji` package.

Iconify names an icon by its Unicode short name in lower case with dashes ("red-apple"). An icon
whose name the package knows gets captions in the languages asked for; any other is captioned by
its own name, in English.

Notation: S pixels of a picture's side.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diff_dalle.errors import UsageError
from diff_dalle.keyed_noise import key_of, uniform

_VAL_ONE_IN = 10
_SMALLEST = 0.75  # of a repeated icon, relative to its first showing
_TONE = re.compile(r"-((medium-)?(light|dark)|medium)-skin-tone|-tone\d")
_PHRASES = {
    "en": ("{}", "{} on a white background", "{} emoji"),
    "ko": ("{}", "흰색 배경의 {}", "{} 이모지"),
}


@dataclass(frozen=True, kw_only=True)
class Icon:
    """One drawing and its names.

    Attributes:
        name: as Iconify spells it.
        body: the inner SVG.
        box: left, top, width and height of its view.
        emoji: the character, "" where the name is not one of the `emoji` package.
        names: language -> name in words; never empty.
        held_out: whether it belongs to the validation split.
    """

    name: str
    body: str
    box: tuple[float, float, float, float]
    emoji: str
    names: dict[str, str]
    held_out: bool

    def captions(self) -> list[str]:
        """Every phrasing in every language, in the order of the languages."""
        return [
            phrase.format(name)
            for language, name in self.names.items()
            for phrase in _PHRASES.get(language, ("{}",))
        ]


@dataclass(frozen=True, kw_only=True)
class IconPicture:
    """An icon on white, perhaps smaller and off the middle.

    Attributes:
        scale: of the icon, at most 1 (then it fills the picture as its artist meant).
        shift: where the room that is left lies, (x, y) in [0, 1]; (0.5, 0.5) is centred.
    """

    icon: Icon
    scale: float = 1.0
    shift: tuple[float, float] = (0.5, 0.5)

    def draw(self, size: int) -> NDArray[np.uint8]:
        """RGB [S,S,3]."""
        from resvg_py import svg_to_bytes

        left, top, width, height = self.icon.box
        side = max(width, height)
        room = side / self.scale
        x = left - (side - width) / 2 - (room - side) * self.shift[0]
        y = top - (side - height) / 2 - (room - side) * self.shift[1]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size}" height="{size}" viewBox="{x} {y} {room} {room}">'
            f"{self.icon.body}</svg>"
        )
        png = svg_to_bytes(
            svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True
        )
        with Image.open(io.BytesIO(bytes(png))) as picture:
            return np.array(picture.convert("RGB"))

    def truth(self) -> dict[str, Any]:
        """The icon, its names and where it was put, as JSON values."""
        icon = self.icon
        return {
            "icon": icon.name,
            "emoji": icon.emoji,
            "names": icon.names,
            "scale": self.scale,
            "shift": list(self.shift),
            "held_out": icon.held_out,
        }


def read_icons(path: str | Path, languages: Sequence[str]) -> list[Icon]:
    """All icons of an Iconify JSON file, in its order; aliases show nothing new and are left out.

    About one in ten is held out, by a hash of the name without its skin tone: the tones of one
    icon, and icons that share a drawing, stay on one side.

    Raises:
        UsageError: no such file, another format, or a language that the package has not.
    """
    missing = [name for name in ("emoji", "resvg_py") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: pip install 'diff_dalle[demo]'")
    drawings = _read(Path(path))
    characters, known = _names(languages)
    first_of: dict[str, str] = {}  # drawing -> the first name it goes by
    icons = []
    for name, drawing in drawings["icons"].items():
        body = drawing["body"]
        stem = _TONE.sub("", first_of.setdefault(body, name))
        emoji = characters.get(name, "")
        icons.append(
            Icon(
                name=name,
                body=body,
                box=_box(drawing, drawings),
                emoji=emoji,
                names=known.get(emoji) or {"en": name.replace("-", " ")},
                held_out=key_of("emoji", stem) % _VAL_ONE_IN == 0,
            )
        )
    return icons


def licence_of(path: str | Path) -> dict[str, str]:
    """Title, SPDX name and address of the artwork's licence, as its package states them.

    Iconify keeps them under "info" in the file or in ``info.json`` beside it.
    """
    beside = Path(path).with_name("info.json")
    info = _read(Path(path)).get("info")
    if info is None and beside.is_file():
        info = json.loads(beside.read_text(encoding="utf-8"))
    licence: dict[str, str] = (info or {}).get("license") or {}
    return licence or {"title": "not stated with the artwork"}


def icon_picture(icons: Sequence[Icon], seed: int, index: int) -> IconPicture:
    """The picture of (seed, index): all icons once, in an order of the seed, then all again.

    The first showing is as drawn; later ones are smaller and moved, as (seed, index) decides.
    ``icons`` must be in an order of `shuffled`.
    """
    icon = icons[index % len(icons)]
    if index < len(icons):
        return IconPicture(icon=icon)
    key = torch.tensor([key_of("emoji", seed, index)])
    scale, x, y = (round(number, 4) for number in uniform(key, (3,), 0)[0].tolist())
    return IconPicture(icon=icon, scale=round(_SMALLEST + (1 - _SMALLEST) * scale, 4), shift=(x, y))


def shuffled(icons: Sequence[Icon], seed: int) -> list[Icon]:
    """The icons in an order that depends on the seed and their names alone."""
    return sorted(icons, key=lambda icon: (key_of("order", seed, icon.name), icon.name))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--artwork {path}: no Iconify JSON can be read there ({error}); "
            "get one with: npm pack @iconify-json/noto"
        ) from error
    icons = content.get("icons") if isinstance(content, dict) else None
    whole = isinstance(icons, dict) and all(
        isinstance(icon, dict) and isinstance(icon.get("body"), str) for icon in icons.values()
    )
    if not icons or not whole:
        raise UsageError(
            f"--artwork {path}: not an Iconify JSON with drawings "
            '(expected {"icons": {name: {"body": svg}}}): name the icons.json of such a package'
        )
    return content


def _box(drawing: dict[str, Any], defaults: dict[str, Any]) -> tuple[float, float, float, float]:
    """Iconify's own defaults: a view of 16 x 16 from (0, 0)."""
    left, top = (drawing.get(key, defaults.get(key, 0)) for key in ("left", "top"))
    width, height = (drawing.get(key, defaults.get(key, 16)) for key in ("width", "height"))
    return float(left), float(top), float(width), float(height)


def _names(languages: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Icon name -> character, and character -> language -> name."""
    import emoji

    unknown = [language for language in languages if language not in emoji.LANGUAGES]
    if unknown or not languages:
        have = " ".join(emoji.LANGUAGES)
        raise UsageError(f"--languages {' '.join(unknown)}: choose one or more of {have}")
    emoji.config.load_language(list(languages))
    characters: dict[str, str] = {}
    known: dict[str, dict[str, str]] = {}
    # Fully qualified characters before the shorter spellings that repeat their names.
    for character, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"]):
        english = _words(entry["en"])
        if slug := _slug(english):
            flag = "\U0001f1e6" <= character[0] <= "\U0001f1ff"
            characters.setdefault(f"flag-{slug}" if flag else slug, character)
        known[character] = {
            language: _words(entry[language]) for language in languages if language in entry
        }
    return characters, known


def _words(name: str) -> str:
    """':red_apple:' -> 'red apple'."""
    return name.strip(":").replace("_", " ")


def _slug(words: str) -> str:
    """As Iconify spells a name; "" for names told apart by a sign that it drops (keycaps)."""
    if "#" in words or "*" in words:
        return ""
    plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
