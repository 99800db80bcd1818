"""What an upsampler sees of the smaller stage: shrunk, blurred, noised, enlarged.

Pure functions of tensors. Notation: B batch, C channels, H W pixels, h w pixels when small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def downsample(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Shrink without aliasing.

    Args:
        image: float [B,C,H,W].
        size: (h, w) of the result in pixels, at most H and W; one number for both.
    Returns:
        [B,C,h,w]: the mean over each box for whole factors, else an antialiased bicubic resize.
    """
    height, width = image.shape[2:]
    h, w = (size, size) if isinstance(size, int) else size
    if height % h == 0 and width % w == 0:
        return F.avg_pool2d(image, (height // h, width // w))
    return F.interpolate(image, (h, w), mode="bicubic", antialias=True)


def enlarge(image: Tensor, size: tuple[int, int]) -> Tensor:
    """How an upsampler is shown the small picture: stretched, bilinearly, over what it makes.

    Args:
        image: float [B,C,h,w].
        size: (H, W) of the result in pixels; (h, w) leaves ``image`` exactly as it is.
    Returns:
        [B,C,H,W].
    """
    return F.interpolate(image, size, mode="bilinear")


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int = 1) -> Tensor:
    """Blur each image with its own Gaussian, edges reflected.

    Args:
        x: float [B,C,H,W].
        sigma: float [B] in pixels, 0 or more; 0 leaves an image exactly as it is.
        radius: pixels of the kernel on each side of its centre, one standard deviation or more:
            1 for every sigma up to 1 (0.4 to 0.6 are used).
    Returns:
        [B,C,H,W].
    """
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    # sigma 0 would divide by zero; a tiny one gives the weights (…, 0, 1, 0, …) exactly.
    width = sigma.to(x.dtype).clamp(min=1e-3)[:, None]  # [B,1]
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)  # [B,2*radius+1]
    kernel = kernel / kernel.sum(1, keepdim=True)
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    rows = _weighted_shifts(padded, kernel, dim=2, length=x.shape[2])
    return _weighted_shifts(rows, kernel, dim=3, length=x.shape[3])


def _weighted_shifts(x: Tensor, kernel: Tensor, *, dim: int, length: int) -> Tensor:
    """Sum over i of kernel[:, i] times ``x`` shifted by i pixels along ``dim``."""
    taps = kernel.unbind(1)  # each [B]
    total = torch.zeros_like(x.narrow(dim, 0, length))
    for i, tap in enumerate(taps):
        total = total + tap[:, None, None, None] * x.narrow(dim, i, length)
    return total


def augment(x: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Noise augmentation (Ho et al. 2021, "Cascaded diffusion models", section 4).

    Args:
        x: float [B,C,H,W].
        level: float [B] in [0, 1]; 0 leaves an image exactly as it is, 1 leaves noise alone.
        noise: standard normal, like ``x``.
    Returns:
        sqrt(1 - level^2) * x + level * noise, [B,C,H,W].
    """
    level = level.to(x.dtype)[:, None, None, None]
    return torch.sqrt(1 - level**2) * x + level * noise
