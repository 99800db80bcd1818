"""Features of pictures for the Fréchet distance, with nothing to download.

``bands``: how much there is in each band of scale and orientation, in logarithms, as the models
of early vision have it (Portilla and Simoncelli 2000). It sees blur, ringing and noise; it hardly
sees what is in the picture.

``random``: a small convolutional network with fixed random weights, pooled to the logarithms of
mean and standard deviation per channel at four scales. Random filters describe texture nearly as
well as trained ones (Ustyuzhaninov et al. 2016, "Texture synthesis using shallow convolutional
networks with random filters").

``shapes``: the last layer but one of a small classifier of demo scenes, trained on nothing else.
It sees what is in the picture, which the other two hardly do, and noise; fine blur it hardly sees.
Of other pictures it says nothing, and neither of what is finer than a 64th of the picture.

All are functions of the pixels and of nothing else, the same on every machine up to rounding.
They are no substitute for a trained network's idea of a picture: compare two upsamplers with them,
not two papers. Notation: B batch, C channels, H W pixels, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from diff_dalle import keyed_noise
from diff_dalle.evaluation.shapes_classifier import trained_classifier

_BAND_LEVELS = 5
_NOISE_FLOOR = 1e-3  # a quarter of one grey level: keeps the logarithm of a flat picture finite
_RANDOM_FLOOR = 1e-3
_RANDOM_LEVELS = 4
_RANDOM_WIDTH = 16
_RANDOM_OUTPUTS = 8

# BT.601 luma and two colour differences; the rows of the last two sum to 0.
_YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows down, columns right


def band_features(images: Tensor) -> Tensor:
    """uint8 [B,3,H,W] -> float32 [B, 56], H and W at least 48.

    For each of five octaves: of luma along four directions, the logarithm of the root mean square
    and of the mean magnitude over it (sparseness: 0 for even texture, negative for lone edges);
    of each colour difference the logarithm of the root mean square. Then mean and standard
    deviation of each channel.
    """
    ycc = torch.einsum("dc,bchw->bdhw", _YCC.to(images.device), images.float() / 255)  # [B,3,H,W]
    features = [ycc.mean(dim=(2, 3)), ycc.std(dim=(2, 3), correction=0)]  # [B,3] each
    for level in range(_BAND_LEVELS):
        height, width = ycc.shape[-2:]
        if min(height, width) < 3:
            raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} are too small")
        bands = [_second_difference(ycc, *direction) for direction in _DIRECTIONS]  # [B,3,h,w]
        rms = torch.stack([b.square().mean(dim=(2, 3)).sqrt() for b in bands], 2) + _NOISE_FLOOR
        magnitude = torch.stack([b.abs().mean(dim=(2, 3)) for b in bands], 2) + _NOISE_FLOOR
        features.append(rms[:, 0].log())  # [B,4]
        features.append((magnitude[:, 0] / rms[:, 0]).log())  # [B,4]
        features.append(rms[:, 1:].mean(dim=2).log())  # [B,2]
        if level < _BAND_LEVELS - 1:
            ycc = F.avg_pool2d(ycc, 2)
    return torch.cat(features, dim=1)  # [B,56]


def random_features(images: Tensor) -> Tensor:
    """uint8 [B,3,H,W] -> float32 [B, 64], H and W at least 48.

    At each of four octaves: two layers of random 3 x 3 filters with ReLU, eight outputs, the
    logarithms of their means and standard deviations over the picture. Without logarithms the
    contrast of the colours that happen to meet would hide the sharpness of their edges.
    """
    x = images.float() / 127.5 - 1  # [B,3,H,W]
    features = []
    for level in range(_RANDOM_LEVELS):
        first = _random_filters("first", level, _RANDOM_WIDTH, 3).to(x.device)
        second = _random_filters("second", level, _RANDOM_OUTPUTS, _RANDOM_WIDTH).to(x.device)
        hidden = F.relu(F.conv2d(x, first))  # [B,16,h,w]
        output = F.relu(F.conv2d(hidden, second, stride=2))  # [B,8,h/2,w/2]
        pooled = output.mean(dim=(2, 3)), output.std(dim=(2, 3), correction=0)  # [B,8] each
        features += [(value + _RANDOM_FLOOR).log() for value in pooled]
        x = F.avg_pool2d(x, 2)
    return torch.cat(features, dim=1)  # [B,64]


def shape_features(images: Tensor) -> Tensor:
    """uint8 [B,3,H,W] -> float32 [B, 64], H and W at least 64; see `shapes_classifier`."""
    return trained_classifier(images.device).features(images)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "bands": band_features,
    "random": random_features,
    "shapes": shape_features,
}
LEAST_SIDE = {"bands": 48, "random": 48, "shapes": 64}  # pixels that each can be taken of
ANY_PICTURE = ("bands", "random")  # those that mean something whatever the pictures show


def extract(
    name: str, images: Iterable[Tensor] | Tensor, batch_size: int = 16
) -> NDArray[np.float64]:
    """Features [N, D] of uint8 pictures [3,H,W], a few at a time."""
    function = FEATURES[name]
    rows, batch = [], []
    with torch.no_grad():
        for image in images:
            batch.append(image)
            if len(batch) == batch_size:
                rows.append(function(torch.stack(batch)).double().cpu().numpy())
                batch = []
        if batch:
            rows.append(function(torch.stack(batch)).double().cpu().numpy())
    return np.concatenate(rows)


def _second_difference(image: Tensor, down: int, right: int) -> Tensor:
    """Each pixel of [B,C,H,W] less the mean of two opposite neighbours, [B,C,H-2,W-2]."""
    height, width = image.shape[-2:]

    def shifted(sign: int) -> Tensor:
        top, left = 1 + sign * down, 1 + sign * right
        return image[..., top : top + height - 2, left : left + width - 2]

    return shifted(0) - (shifted(1) + shifted(-1)) / 2


def _random_filters(layer: str, level: int, outputs: int, inputs: int) -> Tensor:
    """Normal filters [outputs, inputs, 3, 3] of variance 2 / fan-in (He et al. 2015)."""
    keys = torch.tensor([keyed_noise.key_of("frechet features", layer, level)])
    weights = keyed_noise.normal(keys, (outputs, inputs, 3, 3), stream=0)[0]
    if inputs == 3:
        # No answer to a flat colour, or plain colour would drown everything else.
        weights = weights - weights.mean(dim=(2, 3), keepdim=True)
    return weights * math.sqrt(2 / (9 * inputs))
