"""A small classifier of one-object demo scenes; its last layer but one makes the `shapes` features.

`benchmarks/train_shapes_classifier.py` trained the weights that lie beside this file, in
``shapes_classifier.npz``: float16 arrays, one an entry of the state by its name, and ``metadata``,
JSON that says how they came about. Reading them runs nothing that the file says.

Notation: B batch, H W pixels, D = 64 features.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diff_dalle.data.scenes import POSITIONS, position_of
from diff_dalle.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene

SIDE = 64  # pixels of the shorter side that the network sees
WEIGHTS = "shapes_classifier.npz"
HEADS: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "position": POSITIONS,
}
# What pictures of the training set were done to: colours shifted, and so on.
DAMAGES = ("colour", "blur", "noise", "jpeg")
_WIDTHS = (24, 48, 64, 64)


class ShapesClassifier(nn.Module):
    """Four convolutions that halve the picture, a mean over it, and a linear head an attribute.

    One more head names the damage that a picture took, so that the features tell a blurred star
    from a sharp one instead of looking through the blur. Two channels of coordinates tell the
    filters where they are, or the mean would lose it. The means are standardised, by the training
    set's mean and variance, so that each counts alike in a Fréchet distance; nothing is normalised
    before, since how strongly a filter answers is part of what a picture looks like.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = (5, *_WIDTHS[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(inputs, _WIDTHS, strict=True)
        )
        self.standardise = nn.BatchNorm1d(_WIDTHS[-1], momentum=0.01, affine=False)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(_WIDTHS[-1], len(words)) for name, words in HEADS.items()}
        )
        self.damage = nn.Linear(_WIDTHS[-1], len(DAMAGES))

    def features(self, images: Tensor) -> Tensor:
        """Pictures [B,3,H,W] with values 0 … 255 -> float32 [B,D].

        Larger pictures are averaged down until the shorter side has 64 pixels.

        Raises:
            ValueError: a side below 64 pixels.
        """
        x = with_coordinates(averaged(images.float()) / 127.5 - 1)  # [B,5,h,w]
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return self.standardise(x.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B, number of words] for each of `HEADS`; arguments as in `features`.

        Those of ``damage``, [B, 4], are one for each of `DAMAGES`, of which several may be true.
        """
        features = self.features(images)
        logits = {name: head(features) for name, head in self.heads.items()}
        return {**logits, "damage": self.damage(features)}


def averaged(images: Tensor) -> Tensor:
    """float [B,3,H,W] -> float [B,3,h,w] with min(h, w) = 64, each value a mean over its area."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    if shorter < SIDE:
        raise ValueError(f"images of {height} x {width} are too small: {SIDE} is the least")
    if shorter == SIDE:
        return images
    size = round(height * SIDE / shorter), round(width * SIDE / shorter)
    return F.adaptive_avg_pool2d(images, size)


def with_coordinates(x: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,5,H,W]: behind the colours, x and y of each pixel, -1 … 1."""
    batch, _, height, width = x.shape
    right = torch.linspace(-1, 1, width, device=x.device).expand(batch, 1, height, width)
    down = torch.linspace(-1, 1, height, device=x.device)[:, None].expand(batch, 1, height, width)
    return torch.cat([x, right, down], dim=1)


def classes_of(scene: Scene) -> list[int]:
    """What a one-object scene shows: for each of `HEADS` the number of its word."""
    (thing,) = scene.objects
    position = position_of(thing)
    words = (scene.background, thing.colour, thing.shape, thing.size, position)
    return [known.index(word or "") for known, word in zip(HEADS.values(), words, strict=True)]


def read_weights() -> tuple[dict[str, NDArray[np.float16]], dict[str, Any]]:
    """The committed weights by their names in the state, and how they came about."""
    with resources.files(__package__).joinpath(WEIGHTS).open("rb") as file:
        arrays = dict(np.load(file, allow_pickle=False))
    metadata = json.loads(str(arrays.pop("metadata")))
    return arrays, metadata


@functools.cache
def trained_classifier(device: torch.device) -> ShapesClassifier:
    """The classifier with the committed weights, frozen; one a device, shared by all callers."""
    network = ShapesClassifier()
    weights, _ = read_weights()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return network.requires_grad_(False).eval().to(device)
