"""From the bytes of one image file to the pixels that a model sees, or the reason why not.

A large JPEG is decoded at a reduced size by its own cosine transform (Pillow's ``draft``), but
never below `DRAFT_FACTOR` times the size asked for, then resized with a Lanczos filter. The
crops are those of guided-diffusion: resize so that the shorter side fits, then cut a square.

Notation: H W and S pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diff_dalle.data.batch import BadSample
from diff_dalle.data.limits import MAX_PIXELS
from diff_dalle.data.pillow_faults import reason_of, without_16_bit

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# Photographs of 1 and 4 Mpx, to 64 and to 256 px, against a Lanczos filter on a full decode:
# 1.5 stays at 48-54 dB and is 1.7-5 times as fast as the ancestors' way (38-44 dB); 2 gives
# 54-92 dB, but 1 Mpx -> 256 px is then slower than theirs.
DRAFT_FACTOR = 1.5

_FORMATS = ("JPEG", "PNG", "WEBP")  # a short list: decoders of other formats may start programs
_SMALLEST_CROP = 0.8  # of the shorter side, as in guided-diffusion
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_QUARTER_TURNS = (5, 6, 7, 8)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """A random square, as three numbers in (0, 1).

    Attributes:
        scale: 0 keeps the whole shorter side, 1 keeps 0.8 of it.
        top: where the square lies; 0 is the top edge, 1 the bottom edge.
        left: where the square lies; 0 is the left edge, 1 the right edge.
    """

    scale: float
    top: float
    left: float


def decode(
    data: bytes, size: int | tuple[int, int], *, crop: Crop | None = None, flip: bool = False
) -> Pixels:
    """The part that a model sees of an image file: as much as its shape allows.

    Alpha is composed over white; CMYK, palettes, grey and 16-bit become 8-bit RGB; the EXIF
    orientation is applied; of an animation the first frame counts.

    Args:
        data: a whole JPEG, PNG or WebP file.
        size: (H, W) in pixels of the upright picture; one number S for a square.
        crop: which square; None is the centre, and the only one for other shapes.
        flip: mirror left and right.
    Returns:
        uint8 [3,H,W], contiguous.
    Raises:
        BadSample: "empty file", "not an image", "truncated", "broken", "bomb" (too many
            pixels) or "too small" (a side has fewer pixels than are asked for).
        MemoryError: there is no room for the decoded picture.
    """
    if not data:
        raise BadSample("empty file")
    with warnings.catch_warnings():
        # Odd metadata and merely large images are no news for whoever trains.
        warnings.simplefilter("ignore")
        try:
            height, width = (size, size) if isinstance(size, int) else size
            if height != width and _lies(data):
                height, width = width, height
            picture = _part(data, (height, width), crop)
        except (BadSample, MemoryError, AttributeError):
            raise  # the last two are the machine's and the library's faults, not the file's
        except Exception as error:  # decoders raise anything on hostile bytes
            raise BadSample(reason_of(error)) from error
    pixels = np.asarray(picture)  # [H,W,3]
    if flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized_and_corner(
    width: int, height: int, size: tuple[int, int], crop: Crop | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Guided-diffusion's two steps: resize to (W, H), then cut ``size`` at (left, top).

    Args:
        width: of the picture, pixels.
        height: of the picture, pixels.
        size: (height, width) of what is kept.
        crop: which square; None is the centre.
    """
    kept_high, kept_wide = size
    scale = max(kept_high / height, kept_wide / width)
    if crop is not None:
        side = kept_high
        # A small image is not enlarged for the sake of a smaller crop.
        largest = min(math.ceil(side / _SMALLEST_CROP), min(width, height))
        scale = _pick(crop.scale, side, largest) / min(width, height)
    wide, high = round(width * scale), round(height * scale)
    spare_wide, spare_high = wide - kept_wide, high - kept_high
    if crop is None:
        return (wide, high), (spare_wide // 2, spare_high // 2)
    return (wide, high), (_pick(crop.left, 0, spare_wide), _pick(crop.top, 0, spare_high))


def _lies(data: bytes) -> bool:
    """Whether a viewer would turn the picture by a quarter."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
        # All but JPEG may be loaded for their metadata.
        if picture.format != "JPEG" and picture.width * picture.height > MAX_PIXELS:
            raise BadSample("bomb")
        return orientation(picture) in _QUARTER_TURNS


def _part(data: bytes, size: tuple[int, int], crop: Crop | None) -> Image.Image:
    """``size`` (H, W) counts along the axes of the file; what comes back is upright."""
    picture: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = picture.size
    kept_high, kept_wide = size
    if height < kept_high or width < kept_wide:
        raise BadSample("too small")
    (wide, high), (left, top) = resized_and_corner(width, height, size, crop)
    wanted = (math.ceil(DRAFT_FACTOR * wide), math.ceil(DRAFT_FACTOR * high))
    draft = picture.draft("", wanted)  # does nothing to other formats than JPEG
    # The size of a reduced picture is rounded up; its true extent is what the box says.
    extent = draft[1][2:] if draft else picture.size
    if picture.width * picture.height > MAX_PIXELS:
        raise BadSample("bomb")
    # Before the metadata: what reads those of a PNG loads it too, and swallows its faults.
    picture.load()
    turn = _UPRIGHT.get(orientation(picture))
    picture = _as_rgb(picture)
    across, down = extent[0] / wide, extent[1] / high  # decoded pixels per resized pixel
    box = (
        left * across,
        top * down,
        min((left + kept_wide) * across, picture.width),
        min((top + kept_high) * down, picture.height),
    )
    # Resizing a box equals resizing the picture and cutting: the filter reads beyond the box.
    picture = picture.resize((kept_wide, kept_high), Image.Resampling.LANCZOS, box)
    return picture if turn is None else picture.transpose(turn)


def _as_rgb(picture: Image.Image) -> Image.Image:
    picture = without_16_bit(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where nothing readable says otherwise."""
    try:
        return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # unreadable metadata must not cost a readable image
        return 1


def _pick(u: float, low: int, high: int) -> int:
    """An integer of low … high, both included, for u in [0, 1)."""
    return min(low + int(u * (high - low + 1)), high)
