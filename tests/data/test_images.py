"""Every kind of image file becomes the right square, or a short reason."""

from __future__ import annotations

import io
import math
import struct
import time
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from diff_dalle.data import images
from diff_dalle.data.batch import BadSample
from diff_dalle.data.images import Crop, decode, resized_and_corner


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with some texture, as a photograph has."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cells, weight in ((3, 0.5), (9, 0.3), (40, 0.2)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += weight * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def reference(picture: Image.Image, size: int) -> np.ndarray:
    """Resize all of it with a Lanczos filter, then cut the centre."""
    scale = size / min(picture.size)
    wide, high = (round(side * scale) for side in picture.size)
    left, top = (wide - size) // 2, (high - size) // 2
    resized = picture.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def reason(data: bytes, size: int = 16) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, size)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(64, 64), (90, 64), (64, 90), (65, 200), (333, 131)])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_equal_a_full_lanczos(shape: tuple[int, int], kind: str) -> None:
    picture = scene(*shape)
    got = decode(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})), 32)
    assert got.shape == (3, 32, 32) and got.dtype == np.uint8 and got.flags.c_contiguous
    # Resizing a box rounds once, resizing and cutting also once: half a level apart at most.
    assert np.abs(got.astype(int) - reference(picture, 32)).max() <= 1


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (101, 64)])
def test_an_image_of_the_right_size_is_not_touched(shape: tuple[int, int]) -> None:
    picture = scene(*shape)
    width, height = shape
    left, top = (width - 64) // 2, (height - 64) // 2
    expected = np.asarray(picture)[top : top + 64, left : left + 64].transpose(2, 0, 1)
    assert np.array_equal(decode(encoded(picture, "PNG"), 64), expected)


@pytest.mark.parametrize("shape", [(1155, 866), (867, 1154), (1000, 1000), (640, 480)])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_reduced_jpeg_decoding_stays_close_to_a_full_lanczos(
    shape: tuple[int, int], size: int
) -> None:
    data = encoded(scene(*shape), "JPEG", quality=90)
    full = Image.open(io.BytesIO(data))
    assert decibels(decode(data, size), reference(full, size)) > 46


def test_reduced_decoding_is_several_times_as_fast() -> None:
    data = encoded(scene(2000, 1500), "JPEG", quality=90)

    def full() -> None:
        reference(Image.open(io.BytesIO(data)), 64)

    def best(function) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    assert best(full) / best(lambda: decode(data, 64)) > 2


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (16, 16), (17, 16), (2000, 21)])
def test_crops_are_inside_and_follow_guided_diffusion(shape: tuple[int, int]) -> None:
    size, shorter = 16, min(shape)
    assert resized_and_corner(*shape, (size, size), None)[0][shape.index(shorter)] == size
    edges = (0.0, 0.3, 0.7, 0.999999)
    for scale in edges:
        for top in edges:
            (wide, high), corner = resized_and_corner(
                *shape, (size, size), Crop(scale, top, 1 - top)
            )
            smallest = min(wide, high)
            assert size <= smallest <= min(math.ceil(size / 0.8), shorter)
            assert 0 <= corner[0] <= wide - size and 0 <= corner[1] <= high - size
    drawn = Counter(
        min(resized_and_corner(100, 60, (16, 16), Crop((n + 0.5) / 50, 0, 0))[0]) for n in range(50)
    )
    assert drawn == {16: 10, 17: 10, 18: 10, 19: 10, 20: 10}  # randrange(16, 21) there


def test_a_random_crop_shows_the_part_it_names() -> None:
    picture = scene(64, 32)
    data = encoded(picture, "PNG")
    pixels = np.asarray(picture).transpose(2, 0, 1)
    assert np.array_equal(decode(data, 32, crop=Crop(0.0, 0.5, 0.0)), pixels[:, :, :32])
    assert np.array_equal(decode(data, 32, crop=Crop(0.0, 0.5, 0.9999)), pixels[:, :, 32:])


def test_a_flip_mirrors_the_square() -> None:
    data = encoded(scene(50, 40), "PNG")
    assert np.array_equal(decode(data, 32, flip=True), decode(data, 32)[:, :, ::-1])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int, kind: str) -> None:
    picture = scene(96, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture, kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decibels(decode(data, 32), reference(upright, 32)) > 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_other_shapes_are_cut_from_the_upright_picture(orientation: int, kind: str) -> None:
    """24 rows of 40 pixels: all of the width of what viewers show, or all of its height."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(scene(200, 160), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    wide, high = upright.size
    scale = max(24 / high, 40 / wide)
    resized = upright.resize((round(wide * scale), round(high * scale)), Image.Resampling.LANCZOS)
    left, top = (resized.width - 40) // 2, (resized.height - 24) // 2
    expected = np.asarray(resized.crop((left, top, left + 40, top + 24))).transpose(2, 0, 1)
    got = decode(data, (24, 40))
    assert got.shape == expected.shape and decibels(got, expected) > 40


def test_other_shapes_are_refused_by_the_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(scene(40, 20), "PNG", exif=exif)  # shown as 20 x 40
    assert decode(lying, (40, 10)).shape == (3, 40, 10)
    for size in ((10, 40), (41, 10), (40, 21)):
        with pytest.raises(BadSample, match="too small"):
            decode(lying, size)
    with pytest.raises(BadSample, match="bomb"):
        decode(huge_png(10_000), (16, 24))


def test_unreadable_metadata_does_not_matter() -> None:
    data = encoded(scene(40, 40), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff\xff")
    assert decode(data, 16).shape == (3, 16, 16)


def test_alpha_lies_over_white() -> None:
    picture = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    picture.paste((0, 100, 0, 255), (0, 0, 16, 32))
    picture.paste((0, 0, 0, 51), (16, 16, 32, 32))  # a fifth of black
    for kind in ("PNG", "WEBP"):
        got = decode(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})), 32)
        assert got[:, 0, 0].tolist() == [0, 100, 0]
        assert got[:, 0, 31].tolist() == [255, 255, 255]
        assert got[:, 31, 31].tolist() == [204, 204, 204]
    grey = Image.new("LA", (16, 16), (10, 0))
    assert (decode(encoded(grey, "PNG"), 16) == 255).all()


def test_palettes_with_and_without_transparency() -> None:
    picture = scene(32, 32).quantize(8)
    expected = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(encoded(picture, "PNG"), 32), expected)
    clear = picture.getpixel((0, 0))
    got = decode(encoded(picture, "PNG", transparency=clear), 32)
    hidden = np.asarray(picture) == clear
    assert (got[:, hidden] == 255).all()
    assert np.array_equal(got[:, ~hidden], expected[:, ~hidden])


def test_grey_of_1_8_and_16_bits() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    expected = np.stack([ramp] * 3)
    assert np.array_equal(decode(encoded(Image.fromarray(ramp), "PNG"), 256), expected)
    deep = ramp.astype(np.uint16) * 257
    assert np.array_equal(decode(encoded(Image.fromarray(deep), "PNG"), 256), expected)
    bits = Image.fromarray(ramp).convert("1")
    assert set(np.unique(decode(encoded(bits, "PNG"), 256))) == {0, 255}
    jpeg = decode(encoded(Image.fromarray(ramp), "JPEG", quality=95), 64)
    assert np.array_equal(jpeg[0], jpeg[1]) and np.array_equal(jpeg[0], jpeg[2])


def test_cmyk_jpeg() -> None:
    picture = scene(64, 64)
    got = decode(encoded(picture.convert("CMYK"), "JPEG", quality=95), 64)
    assert decibels(got, np.asarray(picture).transpose(2, 0, 1)) > 28


def test_of_an_animation_the_first_frame_counts() -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    for kind in ("PNG", "WEBP"):
        options = {"save_all": True, "append_images": [second], "duration": 100}
        options |= {"lossless": True} if kind == "WEBP" else {}
        assert decode(encoded(first, kind, **options), 16)[:, 8, 8].tolist() == [255, 0, 0]


def test_too_small_is_judged_by_the_shorter_side() -> None:
    assert reason(encoded(scene(16, 15), "PNG")) == "too small"
    assert reason(encoded(Image.new("RGB", (1, 10_000)), "PNG")) == "too small"
    assert decode(encoded(scene(16, 16), "PNG"), 16).shape == (3, 16, 16)


def huge_png(side: int) -> bytes:
    """A well-formed beginning of a PNG that announces ``side`` × ``side`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side * 3 * 100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_reasons_are_short_and_stable() -> None:
    whole = encoded(scene(64, 64), "JPEG")
    assert reason(b"") == "empty file"
    assert reason(b"<html>not found</html>") == "not an image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"
    assert reason(encoded(scene(64, 64), "TIFF")) == "not an image"
    assert reason(whole[: len(whole) // 2]) == "truncated"
    assert reason(encoded(scene(64, 64), "PNG")[:-200]) == "truncated"
    assert reason(huge_png(10_000)) == "bomb"
    assert reason(huge_png(60_000)) == "bomb"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_cannot_be_loaded_whole_is_refused(kind: str) -> None:
    whole, refused = encoded(scene(48, 40), kind), 0
    rng = np.random.default_rng(1)
    for place in np.linspace(20, len(whole) - 1, 120, dtype=int):
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.open(io.BytesIO(data)).load()
        except Exception:
            refused += 1
            assert reason(bytes(data)), place
    assert refused > 5


def test_faults_of_the_machine_and_the_library_are_not_the_files(monkeypatch) -> None:
    data = encoded(scene(40, 40), "PNG")
    for error in (MemoryError, AttributeError):

        def fail(picture: Image.Image, error: type[Exception] = error) -> Image.Image:
            raise error

        monkeypatch.setattr(images, "_as_rgb", fail)
        with pytest.raises(error):
            decode(data, 16)


def test_hostile_bytes_give_a_reason_or_pixels_never_an_exception() -> None:
    rng = np.random.default_rng(0)
    reasons: Counter[str] = Counter()
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(scene(48, 40), kind)
        variants = [whole[:length] for length in range(0, len(whole), 29)]
        for _ in range(150):
            changed = bytearray(whole)
            for place in rng.integers(0, len(whole), rng.integers(1, 8)):
                changed[place] = rng.integers(0, 256)
            variants.append(bytes(changed))
        for data in variants:
            try:
                assert decode(data, 32).shape == (3, 32, 32)
            except BadSample as bad:
                reasons[str(bad)] += 1
    known = {"empty file", "not an image", "truncated", "broken", "bomb", "too small"}
    assert set(reasons) <= known and reasons.total() > 150
