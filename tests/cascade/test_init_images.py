"""Pictures and masks as a user has them: any file, cut as training cuts."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff_dalle.cascade.init_images import Given, read_given
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.sizes import Size

SIZES = [(16, 16), (32, 32)]
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
MASK = np.random.default_rng(1).integers(0, 2, (32, 32), np.uint8) * 255


def read(images: object, masks: object = (), sizes: list[Size] = SIZES, limit: int = 0) -> Given:
    given = read_given(images, masks, sizes, limit)  # type: ignore[arg-type]
    assert given is not None
    return given


def test_every_form_of_a_picture_gives_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    Image.fromarray(PICTURE[::-1]).save(tmp_path / "b.png")
    np.savez(tmp_path / "two.npz", np.stack([PICTURE, PICTURE[::-1]]))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a", "b"):
            for suffix, data in (("png", (tmp_path / f"{name}.png").read_bytes()), ("txt", b"x")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / name).rename(folder / name)
    both = np.stack([PICTURE, PICTURE[::-1]])
    for images in (
        [folder / "a.png", str(folder / "b.png")],
        str(folder),
        str(tmp_path / "two.npz"),
        str(tmp_path / "0.tar"),
        both,
        [PICTURE, Image.fromarray(PICTURE[::-1])],
    ):
        given = read(images)
        np.testing.assert_array_equal(given.pictures, both)
        hashes = [one["sha256"] for one in given.describe()["init_images"]]
        assert hashes == [one["sha256"] for one in read(both).describe()["init_images"]]
    assert len(read(str(tmp_path / "two.npz"), limit=1)) == 1
    assert read_given((), (), SIZES) is None


def test_the_first_pictures_are_taken_with_their_masks(tmp_path: Path) -> None:
    """What lies beyond is counted, not decoded."""
    for name in ("0.png", "1.png"):
        Image.fromarray(PICTURE).save(tmp_path / name)
        Image.fromarray(MASK).save(tmp_path / f"mask{name}")
    (tmp_path / "2.png").write_bytes(b"no")
    images, masks = ([str(tmp_path / f"{k}{n}.png") for n in "012"] for k in ("", "mask"))
    given = read(images, masks, limit=2)
    assert given.masks is not None and given.count == 3
    assert len(given) == len(given.masks) == len(given.names) == len(given.mask_names) == 2
    one = read(images, masks[0], limit=2).masks
    assert one is not None and len(one) == 1
    for two in (masks[:2], [MASK] * 2):
        with pytest.raises(UsageError, match="--masks holds 2 for 3 pictures: give one for all"):
            read(images, two, limit=2)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in images:
        Path(path).rename(folder / Path(path).name)
    assert (read(str(folder), limit=1).count, len(read(str(folder), limit=1))) == (3, 1)
    np.savez(tmp_path / "five.npz", np.stack([PICTURE] * 5))
    assert read([str(tmp_path / "five.npz"), *[str(folder)] * 2], limit=5).count == 11


def test_every_form_of_a_mask_says_where_to_draw(tmp_path: Path) -> None:
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    transparent = np.dstack([np.full((32, 32, 3), 255, np.uint8), MASK])
    wide = (MASK.astype(np.uint16) << 8) + 7
    for mask in (
        MASK,
        MASK > 0,
        Image.fromarray(MASK),
        Image.fromarray(MASK).convert("1"),
        Image.fromarray(MASK).convert("P"),
        Image.fromarray(transparent),
        Image.fromarray(wide),
        tmp_path / "mask.png",
        [str(tmp_path / "mask.png")],
        MASK[None],
    ):
        given = read(PICTURE, mask)
        assert given.masks is not None
        np.testing.assert_array_equal(given.masks, MASK[None])


def test_unreadable_metadata_cost_neither_a_picture_nor_a_mask(tmp_path: Path) -> None:
    for name, pixels in (("picture", PICTURE), ("mask", MASK)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", exif=b"Exif\0\0no metadata at all")
    given = read(tmp_path / "picture.png", tmp_path / "mask.png")
    assert given.masks is not None
    np.testing.assert_array_equal(given.pictures[0], PICTURE)
    np.testing.assert_array_equal(given.masks[0], MASK)


def test_a_mask_is_cut_as_its_picture_is() -> None:
    """A mask that holds the picture's own pixels still does after both were cut and scaled."""
    wide = np.kron(np.random.default_rng(2).integers(0, 2, (32, 48)), np.ones((3, 3))) * 255
    picture = np.repeat(wide.astype(np.uint8)[..., None], 3, axis=2)  # 144 x 96
    given = read(picture, wide.astype(np.uint8))
    assert given.masks is not None and given.pictures.shape == (1, 32, 32, 3)
    white = given.masks[0] == 255
    bright = given.pictures[0, ..., 0] > 127
    assert (white | ~bright).all()  # any white makes white
    assert (white == bright).mean() > 0.99


@pytest.mark.parametrize(("orientation", "degrees"), [(6, 90), (3, 180), (8, 270)])
def test_a_mask_turns_with_a_picture_that_lies_on_its_side(
    tmp_path: Path, orientation: int, degrees: int
) -> None:
    """EXIF says how a camera was held: a mask is painted on what viewers show."""
    shown = np.random.default_rng(3).integers(0, 256, (40, 33, 3), np.uint8)
    stored, exif = Image.fromarray(shown).rotate(degrees, expand=True), Image.Exif()
    exif[0x0112] = orientation
    path, mask = tmp_path / "turned.png", np.zeros((40, 33), np.uint8)
    stored.save(path, exif=exif)
    for turned in (path, Image.open(path)):
        np.testing.assert_array_equal(read(turned, mask).pictures, read(shown, mask).pictures)
        with pytest.raises(UsageError, match="is 40x33 px, but .* is 33x40 px"):
            read(turned, mask.T)


def test_a_small_pixel_of_a_mask_is_as_white_as_its_whitest() -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[5, 8], mask[20, 21] = 255, 51
    picture, drawn = read(PICTURE, mask).at((16, 16), [0, 0], torch.device("cpu"))
    assert picture.shape == (2, 3, 16, 16) and drawn is not None
    expected = torch.zeros(16, 16)
    expected[2, 4], expected[10, 10] = 1, 0.2
    torch.testing.assert_close(drawn, expected.expand(2, 1, -1, -1))
    levels = (picture[1].permute(1, 2, 0).numpy() + 1) * 127.5  # whole, as a stage hands them on
    assert np.abs(levels - levels.round()).max() < 1e-4
    means = PICTURE.reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    assert np.abs(levels - means).max() < 0.5 + 1e-4


def test_pictures_of_several_sizes_are_cut_to_what_all_of_them_hold() -> None:
    given = read([PICTURE, PICTURE[:20]])
    assert given.size == (16, 16) and given.larger == [(32, 32)] and len(given.notes()) == 1
    assert read([PICTURE, PICTURE]).notes() == []


def test_other_shapes_are_the_middle_of_that_shape() -> None:
    """32 x 16 px of a 50 x 40 picture, which has 32 x 26 at that scale."""
    rng = np.random.default_rng(5)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((50, 40))
    mask = np.zeros((40, 50), np.uint8)
    mask[:8], mask[20, 49] = 255, 255
    given = read(smooth, mask, sizes=[(8, 16), (16, 32), (32, 64)])
    assert given.size == (16, 32) and given.larger == [(32, 64)]
    assert "holds 32x16 px, so stages from 64x32 px" in given.notes()[0]
    expected = smooth.resize((32, 26), Image.Resampling.LANCZOS).crop((0, 5, 32, 21))
    assert np.abs(given.pictures[0].astype(int) - np.asarray(expected)).max() <= 1
    assert given.masks is not None and given.masks.shape == (1, 16, 32)
    white = np.argwhere(given.masks[0]).tolist()
    assert white == [*([0, column] for column in range(32)), [8, 31]]
    with pytest.raises(UsageError, match="is 50x40 px, but the first stage makes 20x44 px"):
        read(smooth, sizes=[(44, 20)])


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", np.zeros((2, 3)))
    np.savez(tmp_path / "empty.npz", np.zeros((0, 32, 32, 3), np.uint8))
    np.savez_compressed(tmp_path / "damaged.npz", PICTURE[None])
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[200:300] = b"\xff" * 100
    (tmp_path / "damaged.npz").write_bytes(content)
    for images, message in (
        (str(tmp_path / "no.png"), "--init_images .*no.png cannot be used .not an image"),
        (str(tmp_path / "empty"), "holds neither pictures nor .tar shards"),
        (str(tmp_path / "floats.npz"), "is no npz of pictures"),
        (str(tmp_path / "empty.npz"), "holds no picture"),
        (str(tmp_path / "damaged.npz"), "is no npz of pictures"),
        (np.zeros((32, 32, 7), np.uint8), "array 0 is .32, 32, 7.: give .height, width, 3"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            read(images)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="--masks .*no.png cannot be used .not an image"):
        read(PICTURE, str(tmp_path / "no.png"))


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for path, reason in (("gone.png", "No such file or directory"), ("x.png", "Is a directory")):
        with pytest.raises(UsageError, match=f"--masks .*{path} cannot be read .{reason}") as error:
            read(PICTURE, str(tmp_path / path))
        assert "\n" not in str(error.value)
    Image.fromarray(PICTURE).save(tmp_path / "x.png" / "y.png")
    given = read(str(tmp_path))  # the folder's own name makes it no picture
    assert [Path(name).name for name in given.names] == ["y.png"]
    (tmp_path / "z.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="--init_images .*z.png cannot be read .No such file"):
        read(str(tmp_path))
