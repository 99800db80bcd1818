"""Every kind of image file becomes a member that the loader reads, or a short reason."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diff_dalle.data.images import decode
from diff_dalle.data.limits import MAX_PIXELS
from diff_dalle.data.packing.encode import Encoded, EncodeSettings, Unusable, encode

PLAIN = EncodeSettings(resize=0, quality=95, reencode=False, min_size=0, max_pixels=MAX_PIXELS)


def scene(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def packed(data: bytes, **changes: object) -> Encoded:
    return encode(data, dataclasses.replace(PLAIN, **changes))


def opened(result: Encoded) -> Image.Image:
    picture = Image.open(io.BytesIO(result.data))
    assert picture.size == (result.width, result.height)
    assert picture.format == {"jpg": "JPEG", "png": "PNG"}[result.extension]
    return picture


def reason(data: bytes, **changes: object) -> str:
    with pytest.raises(Unusable) as caught:
        packed(data, **changes)
    return str(caught.value)


def header_png(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize(
    ("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg")]
)
def test_what_needs_no_change_keeps_its_bytes(kind: str, extension: str) -> None:
    data = encoded(scene(), kind)
    assert packed(data, resize=32) == (extension, data, 48, 32)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_other_formats_become_png_of_the_same_pixels(kind: str) -> None:
    picture = scene()
    data = encoded(picture, kind)
    result = packed(data)
    assert result.extension == "png"
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(opened(result)), np.asarray(expected))


def test_the_shorter_side_shrinks_by_lanczos() -> None:
    picture = scene(size=(90, 60))
    result = packed(encoded(picture, "PNG"), resize=20)
    expected = picture.resize((30, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(opened(result)), np.asarray(expected))
    upright = packed(encoded(scene(size=(60, 91)), "JPEG"), resize=20)
    assert opened(upright).size == (20, 30)


def test_photographs_become_jpeg_and_drawings_png() -> None:
    results = {kind: packed(encoded(scene(), kind), reencode=True) for kind in ("JPEG", "WEBP")}
    assert {result.extension for result in results.values()} == {"jpg"}
    assert packed(encoded(scene(), "PNG"), reencode=True).extension == "png"
    small = packed(encoded(scene(), "JPEG"), reencode=True, quality=10)
    assert len(small.data) < len(results["JPEG"].data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_stays_where_a_file_is_encoded_anew(kind: str) -> None:
    picture = scene("RGBA")
    picture.putalpha(100)
    result = opened(packed(encoded(picture, kind), resize=16))
    assert result.mode == "RGBA" and result.getextrema()[3] == (100, 100)


def test_a_palette_with_a_transparent_entry_keeps_it() -> None:
    picture = scene().quantize(4)
    data = encoded(picture, "GIF", transparency=0)
    result = opened(packed(data))
    clear = np.asarray(result)[..., 3] == 0
    assert result.mode == "RGBA" and np.array_equal(clear, np.asarray(picture) == 0)


def test_cmyk_becomes_rgb() -> None:
    data = encoded(scene("CMYK"), "JPEG", quality=95)
    kept, anew = packed(data), packed(data, reencode=True)
    assert kept.data == data
    assert opened(anew).mode == "RGB"
    error = np.asarray(opened(anew)).astype(int) - np.asarray(scene())
    assert np.abs(error).mean() < 3


def test_16_bit_becomes_8_bit_without_clipping() -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = encoded(Image.fromarray(levels), "PNG")
    assert packed(data).data == data
    picture = np.asarray(opened(packed(data, reencode=True)))
    assert np.array_equal(picture[..., 0], (levels >> 8).astype(np.uint8))


def test_exif_turns_what_is_encoded_anew_and_the_sizes_that_are_told() -> None:
    picture, exif = scene(), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    data = encoded(picture, "JPEG", exif=exif, quality=95, subsampling=0)
    assert packed(data) == ("jpg", data, 32, 48)
    turned = opened(packed(data, reencode=True))
    assert turned.getexif().get(0x0112, 1) == 1
    expected = np.asarray(picture.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(np.asarray(turned) - expected).mean() < 3


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [scene(), scene().transpose(Image.Transpose.ROTATE_180)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    result = opened(packed(data))
    assert getattr(result, "n_frames", 1) == 1
    assert np.array_equal(np.asarray(result), np.asarray(frames[0].quantize().convert("RGB")))
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert packed(webp).data == webp


def test_metadata_is_left_out_of_what_is_encoded_anew() -> None:
    for kind in ("JPEG", "PNG", "TIFF"):
        data = encoded(scene(), kind, icc_profile=b"colours" * 9)
        assert "icc_profile" not in opened(packed(data, reencode=True)).info


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_named(kind: str) -> None:
    data = encoded(scene(size=(200, 160)), kind)
    assert reason(data[: len(data) // 2]) in ("truncated", "broken", "not an image")
    packed(data)


def test_reasons() -> None:
    assert reason(b"") == "empty file"
    assert reason(b"<svg/>") == "not an image"
    assert reason(encoded(scene(size=(200, 160)), "JPEG")[:-500]) == "truncated"
    assert reason(header_png(8193, 8192)) == "bomb"
    assert reason(header_png(60000, 60000)) == "bomb"
    assert reason(encoded(scene(), "PNG"), min_size=33) == "too small"
    assert packed(encoded(scene(), "PNG"), min_size=32).height == 32


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_the_loader_reads_all_that_is_packed(mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((32, 48), 3 << 8, np.uint16))
    else:
        picture = scene("L").convert(mode) if mode == "LA" else scene(mode)
    data = encoded(picture, "TIFF")
    result = packed(data)
    assert decode(result.data, 32).shape == (3, 32, 32)
    assert packed(result.data).data == result.data


def test_too_little_memory_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        packed(b"picture")
