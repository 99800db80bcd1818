"""Headers and borders of pictures made for the purpose."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diff_dalle.data.inspection.picture import BARS, WHITE, Header, border_of, read_header


@pytest.mark.parametrize(
    ("mode", "kind", "colour"),
    [
        ("RGB", "JPEG", "RGB"),
        ("L", "JPEG", "grey"),
        ("CMYK", "JPEG", "CMYK"),
        ("1", "PNG", "grey"),
        ("I;16", "PNG", "grey"),
        ("LA", "PNG", "alpha"),
        ("RGBA", "WEBP", "alpha"),
        ("P", "PNG", "palette"),
    ],
)
def test_a_header_tells_size_format_and_colour(encode, mode, kind, colour) -> None:
    data = encode(Image.new(mode, (7, 5)), kind)
    assert read_header(data) == Header(7, 5, kind, colour)


def test_a_palette_with_a_transparent_colour_is_alpha(encode) -> None:
    header = read_header(encode(Image.new("P", (7, 5)), transparency=0))
    assert header is not None and header.colour == "alpha"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_lying_on_its_side_is_stood_up(encode, kind) -> None:
    for orientation, upright in ((1, (7, 5)), (3, (7, 5)), (6, (5, 7)), (8, (5, 7))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        header = read_header(encode(Image.new("RGB", (7, 5)), kind, exif=exif))
        assert header is not None and (header.width, header.height) == upright
        assert header.shorter == 5


def test_what_is_no_image_has_no_header(encode) -> None:
    gif = encode(Image.new("P", (7, 5)), "GIF")
    assert [read_header(data) for data in (b"", b"hello", gif)] == [None] * 3


def test_the_pixels_of_a_png_are_not_read_for_its_header(encode, monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda png: loaded.append(png))
    assert read_header(encode(Image.new("L", (7, 5)))) == Header(7, 5, "PNG", "grey")
    assert loaded == []


def square(size: int = 200) -> np.ndarray:
    """Noise between 0 and 200: neither white nor of one colour anywhere."""
    return np.random.default_rng(0).integers(0, 201, (3, size, size), dtype=np.uint8)


def framed(value: int, width: int) -> np.ndarray:
    pixels = square()
    for band in (pixels[:, :width], pixels[:, -width:], pixels[:, :, :width]):
        band[:] = value
    pixels[:, :, -width:] = value
    return pixels


def test_a_white_border_is_two_per_cent_wide_and_240_bright() -> None:
    assert border_of(square()) == ""
    assert border_of(framed(240, 4)) == WHITE
    assert border_of(framed(240, 3)) == ""
    assert border_of(framed(239, 4)) == BARS
    pixels = framed(255, 4)
    pixels[0, 0, 50:58] = 0  # 1 % of the upper band
    assert border_of(pixels) == WHITE
    pixels[0, 0, 58] = 0
    assert border_of(pixels) == BARS  # of the columns


def test_bars_are_of_one_colour_on_opposite_sides() -> None:
    pixels = square()
    pixels[:, :4] = 90
    assert border_of(pixels) == ""  # the lower one is missing
    pixels[:, -4:] = np.array([10, 20, 30])[:, None, None]
    assert border_of(pixels) == BARS
    pixels[0, 1, 1] = 98
    assert border_of(pixels) == BARS
    pixels[0, 1, 1] = 99
    assert border_of(pixels) == ""
    assert border_of(np.ascontiguousarray(framed(0, 4).transpose(0, 2, 1))) == BARS


def test_a_small_square_has_a_band_of_one_pixel() -> None:
    pixels = square(8)
    pixels[:, 0] = pixels[:, -1] = 0
    assert border_of(pixels) == BARS
    assert border_of(np.full((3, 1, 1), 255, np.uint8)) == WHITE
