"""Where Pillow needs help: what its errors mean, and 16-bit grey. It imports no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image, UnidentifiedImageError


def reason_of(error: Exception) -> str:
    """Why a file could not be decoded: "not an image", "bomb", "truncated" or "broken"."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "bomb"
    return "truncated" if "truncated" in str(error).lower() else "broken"


def without_16_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey as RGB of 8 bits, which Pillow's own conversion clips to white; else the same."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
