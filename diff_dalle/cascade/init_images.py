"""The pictures that a run edits, and their masks: from files, shards, PIL or arrays to pixels.

M pictures, H W pixels of what is kept of one: the middle, cut to the shape of what is drawn and
scaled as training does (`data.images.decode`).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from diff_dalle.cascade.shard_inputs import open_shards
from diff_dalle.data.batch import BadSample
from diff_dalle.data.images import IMAGE_EXTENSIONS, decode, orientation, resized_and_corner
from diff_dalle.data.pillow_faults import reason_of, without_16_bit
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.sizes import Size, spell
from diff_dalle.sampling_io.store import Pictures, map_pictures
from diff_dalle.training.stage import from_uint8, shrink

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[Any]
"""A path, a PIL image, or pixels uint8 [H,W,3] (a mask: uint8 or bool [H,W])."""

_NAME = {
    "init_images": "name a picture, a folder, shards or an npz",
    "masks": "name a picture, or one for each of --init_images",
}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """M pictures to edit, and where they are drawn anew.

    Attributes:
        pictures: uint8 [M,H,W,3], of the largest stage's size that no picture is smaller than.
        count: of all pictures that were named, M or more.
        masks: uint8 [1 or M,H,W], 255 where a stage draws, 0 where the picture is known; None:
            nothing is known.
        names: of the pictures, for messages and the manifest.
        mask_names: of the masks.
        larger: the sizes of stages that see no picture, since some picture is smaller.
    """

    pictures: Pictures
    count: int
    masks: NDArray[np.uint8] | None
    names: Sequence[str]
    mask_names: Sequence[str]
    larger: Sequence[Size] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def size(self) -> Size:
        """(H, W) in pixels."""
        return self.pictures.shape[1], self.pictures.shape[2]

    def at(
        self, size: Size, numbers: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Some of the pictures as a stage sees them, and where it draws.

        Args:
            size: (h, w) of the stage's pictures, at most H and W.
            numbers: B numbers of pictures, below M.
            device: for the tensors.
        Returns:
            [B,3,h,w] in [-1, 1], and [B,1,h,w] in [0, 1] or None. A small pixel of a mask is as
            white as the whitest that it stands for.
        """
        picture = torch.from_numpy(self.pictures[numbers])
        picture = from_uint8(shrink(picture.to(device).permute(0, 3, 1, 2), size))
        if self.masks is None:
            return picture, None
        mask = torch.from_numpy(self.masks[[n % len(self.masks) for n in numbers]])
        drawn = mask.to(device)[:, None].float() / 255  # [B,1,H,W]
        return picture, F.adaptive_max_pool2d(drawn, size)

    def notes(self) -> list[str]:
        """Which stages see no picture."""
        if not self.larger:
            return []
        return [
            f"--init_images: the smallest picture holds {spell(self.size)} px, so stages from "
            f"{spell(self.larger[0])} px on follow their small picture alone"
        ]

    def describe(self) -> dict[str, Any]:
        """What a manifest says: names and hashes of the pixels that were used."""
        masks = () if self.masks is None else self.masks
        return {
            "init_images": _hashes(self.names, self.pictures),
            "masks": _hashes(self.mask_names, masks),
        }


def read_given(
    images: ImageLike | Sequence[ImageLike],
    masks: ImageLike | Sequence[ImageLike],
    sizes: Sequence[Size],
    limit: int = 0,
) -> Given | None:
    """The pictures and masks that are named; None for none.

    Args:
        images: pictures; a path may also be a folder of them, shards, or an npz, an array also
            uint8 [M,H,W,3].
        masks: as many, or one for all; each of its picture's size.
        sizes: (H, W) of the stages' pictures, smallest first, all of one shape.
        limit: pictures that are read, the first ones, with their masks; 0: all.
    Raises:
        UsageError: an unreadable input, a mask without a picture or of another size, another
            number of masks, or a picture smaller than the first stage's.
    """
    sources = [_source(image, number) for number, image in enumerate(_listed(images, 3))]
    count, given_masks = sum(source.count for source in sources), _listed(masks, 2)
    if not count:
        if given_masks:
            raise UsageError("--masks belong to pictures: name those with --init_images")
        return None
    if len(given_masks) not in (0, 1, count):
        raise UsageError(
            f"--masks holds {len(given_masks)} for {count} pictures: give one for all, or one each"
        )
    files = chain.from_iterable(source.files for source in sources)
    named = list(islice(files, limit or None))
    named_masks = [_read_mask(mask, n) for n, mask in enumerate(given_masks[: len(named)])]
    upright = [(name, *_upright(data, name)) for name, data in named]
    for name, _, extent in upright:
        if not _holds(extent, sizes[0]):
            raise UsageError(
                f"--init_images {name} is {_by(extent)} px, but the first stage makes "
                f"{spell(sizes[0])} px: give pictures that are no smaller"
            )
    extents = [extent for _, _, extent in upright]
    size = max(stage for stage in sizes if all(_holds(extent, stage) for extent in extents))
    names = [name for name, _, _ in upright]
    return Given(
        pictures=np.stack([_decoded(data, size, name) for name, data, _ in upright]),
        count=count,
        masks=_fitted_masks(named_masks, names, extents, size),
        names=names,
        mask_names=[name for name, _ in named_masks],
        larger=[stage for stage in sizes if stage > size],
    )


def _holds(extent: Size, size: Size) -> bool:
    """Whether a picture has that many pixels in both directions."""
    return extent[0] >= size[0] and extent[1] >= size[1]


def _by(extent: Size) -> str:
    return f"{extent[1]}x{extent[0]}"


def _listed(value: ImageLike | Sequence[ImageLike], dimensions: int) -> list[ImageLike]:
    """One entry a picture of ``dimensions`` axes, folders and files left as they are."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim > dimensions else [value]
    if isinstance(value, str | os.PathLike | Image.Image):
        return [value]
    return list(value)


@dataclass(frozen=True)
class _Source:
    """Some of the pictures.

    Attributes:
        count: how many there are.
        files: their names and encoded files, each read when it is asked for.
    """

    count: int
    files: Iterable[tuple[str, bytes]]


def _source(image: ImageLike, number: int) -> _Source:
    """The pictures of one entry, the ``number``-th."""
    if isinstance(image, Image.Image | np.ndarray):
        png = _png(_as_image(image, "init_images", number))
        return _Source(1, [(f"picture {number}", png)])
    path = os.fspath(image)
    place = Path(path)
    if path.endswith(".tar") or (place.is_dir() and any(place.rglob("*.tar"))):
        return _of_shards(path)
    if place.is_dir():
        return _of_folder(path)
    if place.suffix == ".npz":
        return _of_npz(path)
    return _of_files([path])


def _of_files(paths: Sequence[str]) -> _Source:
    return _Source(len(paths), ((path, _read("init_images", path)) for path in paths))


def _of_folder(path: str) -> _Source:
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    named = (file for file in Path(path).rglob("*") if file.suffix.lower() in suffixes)
    files = sorted(file for file in named if not file.is_dir())
    if not files:
        raise UsageError(f"--init_images {path} holds neither pictures nor .tar shards")
    return _of_files([str(file) for file in files])


def _of_npz(path: str) -> _Source:
    try:
        pictures = map_pictures(path)
    except (OSError, ValueError) as problem:
        raise UsageError(f"--init_images {path} is no npz of pictures ({problem})") from problem
    if not len(pictures):
        raise UsageError(f"--init_images {path} holds no picture: {_NAME['init_images']}")
    return _Source(
        len(pictures),
        (
            (f"{path} picture {number}", _png(Image.fromarray(picture)))
            for number, picture in enumerate(pictures)
        ),
    )


def _of_shards(path: str) -> _Source:
    dataset = open_shards(path, "init_images", with_text=False)

    def files() -> Iterator[tuple[str, bytes]]:
        for number in range(len(dataset)):
            name = f"{path} sample {dataset.entry(number)[1].key}"
            try:
                yield name, dataset.read(number).image
            except BadSample as problem:
                raise _unusable("init_images", name, str(problem)) from problem

    return _Source(len(dataset), files())


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise UsageError(
            f"--{flag} {path} cannot be read ({problem.strerror}): {_NAME[flag]}"
        ) from problem


def _upright(data: bytes, name: str) -> tuple[bytes, Size]:
    """A file without an EXIF orientation, and its height and width."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if orientation(picture) == 1:
                return data, (picture.height, picture.width)
            turned = ImageOps.exif_transpose(picture)
            return _png(turned), (turned.height, turned.width)
    except Exception as problem:  # decoders raise anything on bytes that are no picture
        raise _unusable("init_images", name, reason_of(problem)) from problem


def _decoded(data: bytes, size: Size, name: str) -> Pictures:
    try:
        return decode(data, size).transpose(1, 2, 0)
    except BadSample as problem:
        raise _unusable("init_images", name, str(problem)) from problem


def _read_mask(mask: ImageLike, number: int) -> tuple[str, NDArray[np.uint8]]:
    """A name, and uint8 [H,W]; what is transparent counts as black."""
    if isinstance(mask, Image.Image | np.ndarray):
        name, image = f"mask {number}", _as_image(mask, "masks", number)
    else:
        name = os.fspath(mask)
        data = _read("masks", name)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as problem:
            raise _unusable("masks", name, reason_of(problem)) from problem
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    image = without_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image)
    return name, np.asarray(image.convert("L"))


def _fitted_masks(
    masks: Sequence[tuple[str, NDArray[np.uint8]]],
    names: Sequence[str],
    extents: Sequence[Size],
    size: Size,
) -> NDArray[np.uint8] | None:
    """Masks uint8 [1 or M,H,W], cut as their pictures are; None for none."""
    if not masks:
        return None
    for number, picture in enumerate(names):
        mask_name, mask = masks[number % len(masks)]
        if mask.shape != extents[number]:
            raise UsageError(
                f"--masks {mask_name} is {_by(mask.shape)} px, but {picture} is "
                f"{_by(extents[number])} px: give a mask of its picture's size"
            )
    return np.stack([_cut_mask(mask, size) for _, mask in masks])


def _cut_mask(mask: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """The part of a mask that `decode` cuts of its picture; a pixel is the whitest of its own."""
    height, width = mask.shape
    (wide, high), (left, top) = resized_and_corner(width, height, size, None)
    pooled = F.adaptive_max_pool2d(torch.tensor(mask)[None].float(), (high, wide))[0]
    kept = pooled[top : top + size[0], left : left + size[1]]
    return kept.to(torch.uint8).numpy()


def _as_image(value: Image.Image | NDArray[Any], flag: str, number: int) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if value.dtype not in (np.uint8, np.bool_):
        raise UsageError(f"--{flag}: array {number} is {value.dtype}: give uint8, 0 to 255")
    pixels = value.astype(np.uint8) * 255 if value.dtype == np.bool_ else value
    try:
        return Image.fromarray(pixels)
    except (TypeError, ValueError) as problem:
        raise UsageError(
            f"--{flag}: array {number} is {value.shape}: give (height, width, 3) for a picture, "
            "(height, width) for a mask"
        ) from problem


def _png(picture: Image.Image) -> bytes:
    picture = ImageOps.exif_transpose(picture)
    data = io.BytesIO()
    (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(
        data, "PNG", compress_level=1
    )
    return data.getvalue()


def _unusable(flag: str, name: str, reason: str) -> UsageError:
    return UsageError(f"--{flag} {name} cannot be used ({reason}): give a JPEG, PNG or WebP file")


def _hashes(names: Sequence[str], pixels: Iterable[NDArray[np.uint8]]) -> list[dict[str, str]]:
    return [
        {"source": name, "sha256": hashlib.sha256(one.tobytes()).hexdigest()}
        for name, one in zip(names, pixels, strict=True)
    ]
