"""What benchmarks draw of the demo scenes, and real scenes to hold it against."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from diff_dalle.data.captions import one_object_captions
from diff_dalle.data.shapes import Scene
from diff_dalle.evaluation.features import FEATURES, LEAST_SIDE, extract

REFERENCES, OTHER_SEED = 2_000, 1  # of real scenes, which are other ones of the same captions


def held_out(count: int, seed: int = 0) -> tuple[list[str], list[Scene]]:
    """Captions of combinations that training never shows, which repeat after 480, and scenes."""
    pairs = one_object_captions(count, seed, held_out=True)
    return [caption for caption, _ in pairs], [scene for _, scene in pairs]


def features_of(pictures: Iterable[NDArray[np.uint8]]) -> dict[str, NDArray[np.float64]]:
    """All kinds of features, each [N,D], of uint8 pictures [H,W,3] or of one array of them.

    Pixels of smaller pictures are repeated until a side has 64.
    """
    found = [torch.from_numpy(_enlarged(picture)).permute(2, 0, 1) for picture in pictures]
    return {name: extract(name, found) for name in FEATURES}


def _enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    times = max(1, max(LEAST_SIDE.values()) // picture.shape[0])
    # Always a copy: pictures of a file cannot be written, which torch warns of.
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def real_features(size: int) -> dict[str, NDArray[np.float64]]:
    """`features_of` the real scenes at ``size`` pixels."""
    return features_of([scene.draw(size) for scene in held_out(REFERENCES, OTHER_SEED)[1]])
