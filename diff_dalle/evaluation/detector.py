"""Says what a picture of one object shows: background, colour, shape, by explicit image analysis.

Nothing is trained. The steps, each a function below:

1. The background is the palette colour nearest to the median of the picture's border.
2. The pixels that differ most from that median vote for the object's colour, each for the
   nearest of the palette; others may be blends of two colours, at edges and where it is blurred.
   Most are those nearly as different as the pixel that a fixed share of the picture exceeds.
   Distances are Euclidean in CIELAB.
3. A pixel's coverage is how far it lies on the way from the background to the object's colour;
   the connected region that holds most of the voters is the object.
4. The object, moved and scaled to standard position and area, is compared with templates of all
   shapes in small shifts, sizes and blurs; the largest soft intersection over union wins.

The detector always answers, on noise and on empty pictures too, so that its accuracy there can be
held against chance; ``confidence`` tells such answers apart.

Notation: B pictures, H W pixels, K palette colours, S shapes, V variants of a template,
G pixels of the standard frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

LEAST_SIDE = 32  # pixels of a square that can be judged
WORKING_SIZE = 128  # pixels; larger pictures are averaged down first
_BORDER = 1 / 32  # of the picture's side
_VISIBLE = 10.0  # CIELAB units, of which 2.3 are just noticeable: less is no object
_PEAK_SHARE = 1 / 200  # of the picture's pixels; the smallest objects cover three times as much
_PEAK_TOLERANCE = 0.85
_SOFT_EDGE = 3  # pixels around a region that belong to it
_FRAME = 48  # G
_FRAME_RADIUS = 1.3  # half the standard frame, in square roots of the object's area
_SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
_SHIFTS = (-0.06, 0.0, 0.06)  # in square roots of the area
_BLURS = (0.0, 0.08, 0.16, 0.24)  # standard deviations, in square roots of the area
_CHUNK = 32

# BT.601 luma and colour differences, these at half their weight: JPEG blurs them to twice a pixel.
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.0844, -0.1656, 0.25], [0.25, -0.2094, -0.0406]])

RGB = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Detection:
    """What a picture shows.

    Attributes:
        background: name of the background colour.
        colour: name of the object's colour.
        shape: name of the object's shape.
        confidence: intersection over union with the best template, times the object's share of
            all that is plainly no background: near 1 for a clean scene, near 0 for noise, 0 if
            nothing is there.
        centre: (x, y) of the middle of the object's bounding box, unit coordinates.
        extent: side of its bounding box as a fraction of the picture's side.
    """

    background: str
    colour: str
    shape: str
    confidence: float
    centre: tuple[float, float]
    extent: float


class Detector:
    """A detector for pictures drawn in known colours and outlines."""

    def __init__(
        self,
        colours: Mapping[str, RGB],
        backgrounds: Mapping[str, RGB],
        outlines: Mapping[str, NDArray[np.floating]],
    ) -> None:
        """Prepare palettes and templates.

        Args:
            colours: what objects can have, 0 … 255.
            backgrounds: what backgrounds can have.
            outlines: for each shape its coverage [M,M] in 0 … 1, filling the square.
        """
        self._colours = list(colours)
        self._backgrounds = list(backgrounds)
        self._shapes = list(outlines)
        self._colour_lab = _palette(colours.values())  # [K,3]
        self._background_lab = _palette(backgrounds.values())  # [K,3]
        masks = torch.stack([torch.tensor(mask).float() for mask in outlines.values()])  # [S,M,M]
        self._bank = torch.stack([_variants(mask) for mask in masks])  # [S,V,G*G]
        _, self._centroids, self._areas = _standardised(masks)  # [S,2], [S], in bounding boxes

    def detect(self, image: NDArray[np.uint8]) -> Detection:
        """What a picture uint8 [H,W,3] shows; H = W ≥ 32, up to 128 or a multiple of it."""
        return self.detect_all([image])[0]

    def detect_all(self, images: Iterable[NDArray[np.uint8]]) -> list[Detection]:
        """What each of some equally large pictures uint8 [H,W,3] shows."""
        detections: list[Detection] = []
        chunk: list[Tensor] = []
        for image in images:
            chunk.append(_reduced(image))
            if len(chunk) == _CHUNK:
                detections += self._detect_chunk(torch.stack(chunk))
                chunk = []
        return detections + (self._detect_chunk(torch.stack(chunk)) if chunk else [])

    def _detect_chunk(self, rgb: Tensor) -> list[Detection]:
        """Detections of float [B,3,H,W] in [0, 1]."""
        lab = _lab(rgb)
        back_rgb, back_lab = _border_median(rgb), _border_median(lab)  # [B,3] each
        background = torch.cdist(back_lab, self._background_lab).argmin(dim=1)  # [B]
        difference = (lab - back_lab[:, :, None, None]).square().sum(dim=1).sqrt()  # [B,H,W]
        peak = difference.flatten(1).quantile(1 - _PEAK_SHARE, dim=1)  # [B]
        peak = peak[:, None, None].clamp(min=_VISIBLE)
        colour, own = self._vote(lab, difference >= _PEAK_TOLERANCE * peak)  # [B], [B,H,W]
        coverage = _coverage(rgb, back_rgb, own)  # [B,H,W]
        region = _region(coverage > 0.5, own)  # [B,H,W]
        share = _share(region, difference > 0.5 * peak)  # [B]
        coverage = coverage * region
        frame, centroid, area = _standardised(coverage)
        shape, overlap = self._match(frame)  # [B], [B]
        extent = (area / self._areas[shape]).sqrt()  # [B]
        centre = centroid - (self._centroids[shape] - 0.5) * extent[:, None]  # [B,2]
        return [
            Detection(
                background=self._backgrounds[background[i]],
                colour=self._colours[colour[i]],
                shape=self._shapes[shape[i]],
                confidence=float(overlap[i] * share[i]),
                centre=(float(centre[i, 0]), float(centre[i, 1])),
                extent=float(extent[i]),
            )
            for i in range(len(rgb))
        ]

    def _vote(self, lab: Tensor, voters: Tensor) -> tuple[Tensor, Tensor]:
        """The object's colour [B] and those of the voters [B,H,W] that voted for it."""
        pixels = lab.flatten(2).transpose(1, 2)  # [B,H*W,3]
        nearest = torch.cdist(pixels, self._colour_lab).argmin(dim=2)  # [B,H*W]
        votes = torch.zeros(len(lab), len(self._colours))  # [B,K]
        votes.scatter_add_(1, nearest, voters.float().flatten(1))
        colour = votes.argmax(dim=1)  # [B]
        return colour, voters & (nearest == colour[:, None]).view_as(voters)

    def _match(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """The best shape [B] and its overlap [B] for standardised coverage [B,G,G]."""
        objects = frame.flatten(1)  # [B,G*G]
        templates = self._bank.flatten(0, 1)  # [S*V,G*G]
        both = objects @ templates.T  # [B,S*V]
        sizes = objects.square().sum(1)[:, None] + templates.square().sum(1)[None]
        overlap = both / (sizes - both)  # equal to intersection over union for 0-1 masks
        best, shape = overlap.unflatten(1, self._bank.shape[:2]).amax(dim=2).max(dim=1)
        return shape, best


def _reduced(image: NDArray[np.uint8]) -> Tensor:
    """uint8 [H,W,3] -> float [3,h,w] in [0, 1], averaged down to the working size."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 [H,W,3], not {image.dtype} {image.shape}")
    tensor = torch.tensor(image).permute(2, 0, 1).float() / 255
    factor = image.shape[0] // WORKING_SIZE
    return F.avg_pool2d(tensor, factor) if factor > 1 else tensor


def _lab(rgb: Tensor) -> Tensor:
    """sRGB [B,3,...] in [0, 1] -> CIELAB, D65 (IEC 61966-2-1; CIE 15)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    # The rows' sums are the white point: white gets (1, 1, 1).
    to_xyz = to_xyz / to_xyz.sum(dim=1, keepdim=True)
    x, y, z = torch.einsum("dc,bc...->bd...", to_xyz, linear).unbind(1)
    f = [
        torch.where(v > 0.008856, v.clamp(min=1e-6) ** (1 / 3), 7.787 * v + 16 / 116)
        for v in (x, y, z)
    ]
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])], dim=1)


def _palette(colours: Iterable[RGB]) -> Tensor:
    """CIELAB [K,3] of colours in 0 … 255."""
    return _lab(torch.tensor(list(colours), dtype=torch.float32) / 255)


def _border_median(image: Tensor) -> Tensor:
    """The median [B,C] of the outermost pixels of [B,C,H,W], channel by channel."""
    width = max(1, round(image.shape[-1] * _BORDER))
    ring = torch.ones(image.shape[-2:], dtype=torch.bool)
    ring[width:-width, width:-width] = False
    return image[:, :, ring].median(dim=2).values


def _dilated(mask: Tensor) -> Tensor:
    """A bool mask [B,H,W] grown by one pixel in all eight directions."""
    return _neighbours_maximum(mask.float()) > 0


def _neighbours_maximum(x: Tensor) -> Tensor:
    """The largest of each pixel of [B,H,W] and its eight neighbours; x is nowhere negative."""
    for dim in (1, 2):  # a few times faster than max_pool2d on a CPU
        size = x.shape[dim]
        padded = F.pad(x, (0, 0, 1, 1) if dim == 1 else (1, 1))
        before, after = padded.narrow(dim, 0, size), padded.narrow(dim, 2, size)
        x = torch.maximum(torch.maximum(before, after), x)
    return x


def _coverage(rgb: Tensor, background: Tensor, own: Tensor) -> Tensor:
    """How much of each pixel the object covers, [B,H,W]: 0 not at all, 1 wholly.

    An anti-aliased edge is a blend of the two colours: the position on the line between them.
    """
    image = torch.einsum("dc,bchw->bdhw", _TO_YCC, rgb)  # [B,3,H,W]
    count = own.sum(dim=(1, 2)).clamp(min=1)  # [B]
    colour = torch.einsum("bchw,bhw->bc", image, own.float()) / count[:, None]  # [B,3]
    origin = background @ _TO_YCC.T  # [B,3]
    line = colour - origin  # [B,3]
    along = torch.einsum("bchw,bc->bhw", image - origin[:, :, None, None], line)
    length = line.square().sum(dim=1).clamp(min=1e-6)  # [B]
    # Some room beyond 0 and 1: noise then cancels out instead of adding up.
    covered = (along / length[:, None, None]).clamp(-0.25, 1.25)
    return covered * own.any(dim=(1, 2), keepdim=True)


def _region(solid: Tensor, own: Tensor) -> Tensor:
    """The pixels [B,H,W] of the object, with its soft edge.

    Of the regions of solid pixels [B,H,W], connected over corners, the one that holds most of
    the object's own pixels [B,H,W].
    """
    height, width = solid.shape[1:]
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(height, width)
    labels = numbers * solid  # [B,H,W]
    while True:  # each region takes the largest number in it
        grown = _neighbours_maximum(labels) * solid
        if torch.equal(grown, labels):
            break
        labels = grown
    votes = torch.zeros(len(labels), height * width + 1)
    votes.scatter_add_(1, labels.long().flatten(1), (own & solid).float().flatten(1))
    region = solid & (labels == votes.argmax(dim=1)[:, None, None])
    for _ in range(_SOFT_EDGE):
        region = _dilated(region)
    return region


def _share(region: Tensor, visible: Tensor) -> Tensor:
    """How much [B] of what is visible [B,H,W] lies in a region [B,H,W]."""
    return (region & visible).sum(dim=(1, 2)) / visible.sum(dim=(1, 2)).clamp(min=1)


def _standardised(coverage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The object in standard position and area [B,G,G], its centroid [B,2] and area [B].

    Centroid and area are in units of the picture's side, x before y.
    """
    height, width = coverage.shape[1:]
    area = coverage.sum(dim=(1, 2)).clamp(min=1e-6)  # [B], pixels
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    centre_x = (coverage.sum(dim=1) @ x) / area
    centre_y = (coverage.sum(dim=2) @ y) / area
    centre = torch.stack([centre_x, centre_y], dim=1)  # [B,2]
    area = area / (height * width)
    return _sampled(coverage, centre, area.sqrt() * _FRAME_RADIUS), centre, area


def _sampled(coverage: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """[B,H,W] read on the square of G x G points around a centre [B,2] with a half side [B]."""
    theta = torch.zeros(len(coverage), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 2 * radius  # grid_sample counts the picture as -1 … 1
    theta[:, :, 2] = 2 * centre - 1
    grid = F.affine_grid(theta, [len(coverage), 1, _FRAME, _FRAME], align_corners=False)
    return F.grid_sample(coverage[:, None], grid, align_corners=False)[:, 0]


def _variants(outline: Tensor) -> Tensor:
    """All shifts, sizes and blurs of an outline [M,M] in the standard frame, [V,G*G]."""
    _, centre, area = _standardised(outline[None])
    centres, radii = [], []
    for scale in _SCALES:
        for dx in _SHIFTS:
            for dy in _SHIFTS:
                radii.append(area.sqrt() * _FRAME_RADIUS * scale)
                centres.append(centre + torch.tensor([dx, dy]) * area.sqrt())
    repeated = outline[None].expand(len(radii), -1, -1)
    sharp = _sampled(repeated, torch.cat(centres), torch.cat(radii))  # [V,G,G]
    return torch.cat([_blurred(sharp, sigma) for sigma in _BLURS]).flatten(1)


def _blurred(frames: Tensor, sigma: float) -> Tensor:
    """Frames [V,G,G] under a Gaussian of ``sigma`` square roots of the object's area."""
    if sigma == 0:
        return frames
    pixels = torch.arange(_FRAME, dtype=torch.float32)
    distance = (pixels[:, None] - pixels[None]) * 2 * _FRAME_RADIUS / _FRAME
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)  # [G,G]
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    return kernel @ frames @ kernel.T
