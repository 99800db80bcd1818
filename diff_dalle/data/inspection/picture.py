"""What can be said of one image: its file's header, and the edges of the square it becomes.

Notation: S pixels, the side of the square.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from diff_dalle.data.images import IMAGE_EXTENSIONS, Pixels

COLOURS = ("RGB", "grey", "palette", "CMYK", "alpha")
WHITE, BARS = "white", "bars"

_EDGE = 50  # a band is one fiftieth of the square: 2 %
_WHITE_FROM = 240  # of 255, in every channel
_WHITE_SHARE = 0.99  # of the pixels of a band; the rest may be dust or a watermark
_SAME = 8  # the most that a channel of one-coloured pixels varies after a JPEG
_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # orientations that exchange width and height


class Header(NamedTuple):
    """What an image file says of itself before its pixels are decoded.

    Attributes:
        width: pixels, upright as its EXIF orientation wants it.
        height: pixels, likewise.
        kind: "JPEG", "PNG" or "WEBP".
        colour: one of `COLOURS`; anything with transparency is "alpha".
    """

    width: int
    height: int
    kind: str
    colour: str

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side."""
        return min(self.width, self.height)


def read_header(data: bytes) -> Header | None:
    """The header of an image file, None if it has none that can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=_kinds())
            width, height = picture.size
            if _is_lying(picture):
                width, height = height, width
            return Header(width, height, str(picture.format), _colour(picture))
        except Exception:  # decoders raise anything on hostile bytes
            return None


def border_of(pixels: Pixels) -> str:
    """What frames a square: `WHITE`, `BARS` or "".

    The four bands are the outermost 2 % of the rows and of the columns, one pixel at least.
    `WHITE`: in each of them 99 % of the pixels have 240 or more in every channel. `BARS`: top
    and bottom, or left and right, are each of one colour (a channel varies by 8 at most), as
    letterboxed films are; a picture of one colour throughout counts too.

    Args:
        pixels: uint8 [3,S,S].
    """
    wide = -(-pixels.shape[1] // _EDGE)
    top, bottom = pixels[:, :wide], pixels[:, -wide:]
    left, right = pixels[:, :, :wide], pixels[:, :, -wide:]
    if all(map(_is_white, (top, bottom, left, right))):
        return WHITE
    for pair in ((top, bottom), (left, right)):
        if all(map(_is_of_one_colour, pair)):
            return BARS
    return ""


def _kinds() -> tuple[str, ...]:
    """Pillow's names of the formats that `images` decodes."""
    named = Image.registered_extensions()
    return tuple({named[f".{extension}"] for extension in IMAGE_EXTENSIONS})


def _is_lying(picture: Image.Image) -> bool:
    # Without this test Pillow would decode a whole PNG to look for metadata behind its pixels.
    if "exif" not in picture.info:
        return False
    try:
        return picture.getexif().get(_EXIF_ORIENTATION, 1) in _LYING
    except Exception:  # unreadable metadata must not cost a readable header
        return False


def _colour(picture: Image.Image) -> str:
    if picture.has_transparency_data:
        return "alpha"
    if picture.mode == "P":
        return "palette"
    if picture.mode == "CMYK":
        return "CMYK"
    return "grey" if picture.mode[0] in "1LI" else "RGB"


def _is_white(band: Pixels) -> bool:
    return bool((band.min(axis=0) >= _WHITE_FROM).mean() >= _WHITE_SHARE)


def _is_of_one_colour(band: Pixels) -> bool:
    return bool((np.ptp(band, axis=(1, 2)) <= _SAME).all())
