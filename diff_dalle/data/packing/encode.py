"""One image file as it goes into a shard: its own bytes, or encoded anew where it must be.

It imports no torch: the processes that encode start in a moment and stay small.

Notation: W H pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageOps

from diff_dalle.data.pillow_faults import reason_of, without_16_bit

# A short list: decoders of other formats may start programs. MPO is a JPEG with further views.
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # format -> extension
_LOSSY = ("JPEG", "MPO", "WEBP")


class Unusable(Exception):
    """A record that cannot be packed; the message is one of a few short reasons."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What an image must be.

    Attributes:
        resize: the most pixels of the shorter side; 0: any.
        quality: of JPEG, 1 … 100.
        reencode: encode files anew that could stay as they are.
        min_size: the fewest pixels of the shorter side.
        max_pixels: the most pixels that are decoded.
    """

    resize: int
    quality: int
    reencode: bool
    min_size: int
    max_pixels: int


class Encoded(NamedTuple):
    """A JPEG, PNG or WebP file; W and H are those of the upright picture."""

    extension: str
    data: bytes
    width: int
    height: int


def encode(data: bytes, settings: EncodeSettings) -> Encoded:
    """The file to pack for an image file, after decoding it in full.

    JPEG, PNG and WebP keep their bytes unless they are too large or ``reencode`` is set. Encoded
    anew, a picture is upright, 8-bit and without metadata; photographs (JPEG, WebP) become JPEG,
    everything else and whatever has alpha PNG. Of an animation the first frame counts.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        settings: what it must be.
    Raises:
        Unusable: "empty file", "not an image", "truncated", "broken", "bomb" (too many pixels) or
            "too small".
    """
    if not data:
        raise Unusable("empty file")
    with warnings.catch_warnings():
        # Odd metadata and merely large images are no news for whoever packs.
        warnings.simplefilter("ignore")
        try:
            return _encode(data, settings)
        except (Unusable, MemoryError):  # too little memory says nothing about the picture
            raise
        except Exception as error:  # decoders raise anything on hostile bytes
            raise Unusable(reason_of(error)) from error


def _encode(data: bytes, settings: EncodeSettings) -> Encoded:
    picture: Image.Image = Image.open(io.BytesIO(data), formats=_READ)
    kind = str(picture.format)
    if picture.width * picture.height > settings.max_pixels:
        raise Unusable("bomb")
    if min(picture.size) < settings.min_size:
        raise Unusable("too small")
    picture.load()
    picture = _upright(picture)
    large = 0 < settings.resize < min(picture.size)
    if kind in _KEPT and not (large or settings.reencode):
        return Encoded(_KEPT[kind], data, *picture.size)
    picture = _eight_bit(picture)
    if large:
        scale = settings.resize / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if kind in _LOSSY and picture.mode == "RGB":
        # Halved colour resolution would blur the edges of drawings.
        picture.save(file, "JPEG", quality=settings.quality, subsampling=0)
        return Encoded("jpg", file.getvalue(), *picture.size)
    picture.save(file, "PNG", icc_profile=None)
    return Encoded("png", file.getvalue(), *picture.size)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # unreadable metadata must not cost a readable image
        return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    """RGBA where there is alpha, RGB elsewhere."""
    picture = without_16_bit(picture)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
