"""Shrinking, blurring and noising against scipy, Pillow and formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d

from diff_dalle.models.low_res import augment, downsample, gaussian_blur


def test_downsampling_by_a_whole_factor_is_the_mean_of_each_box() -> None:
    image = torch.rand(2, 3, 12, 12)
    expected = image.view(2, 3, 4, 3, 4, 3).mean((3, 5))
    assert torch.allclose(downsample(image, 4), expected, atol=1e-6)
    assert torch.equal(downsample(image, 12), image)


def test_each_axis_has_a_factor_of_its_own() -> None:
    image = torch.rand(2, 3, 12, 20)
    expected = image.view(2, 3, 4, 3, 10, 2).mean((3, 5))
    assert torch.allclose(downsample(image, (4, 10)), expected, atol=1e-6)
    assert torch.equal(downsample(image, (12, 20)), image)
    assert downsample(image, 4).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(("height", "width", "h", "w"), [(40, 40, 15, 15), (40, 64, 15, 24)])
def test_downsampling_by_another_factor_is_antialiased_as_in_pillow(
    height: int, width: int, h: int, w: int
) -> None:
    image = torch.rand(1, 1, height, width)
    picture = Image.fromarray(image[0, 0].numpy(), mode="F")
    expected = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC))
    assert np.allclose(downsample(image, (h, w))[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.4, 0.5, 0.6, 1.0])
def test_blur_is_a_three_pixel_gaussian(sigma: float) -> None:
    image = torch.rand(1, 1, 9, 7, dtype=torch.float64)
    side = np.exp(-0.5 / sigma**2)
    kernel = np.array([side, 1, side]) / (1 + 2 * side)
    expected = image[0, 0].numpy()
    for axis in (0, 1):
        expected = correlate1d(expected, kernel, axis=axis, mode="mirror")
    blurred = gaussian_blur(image, torch.tensor([sigma], dtype=torch.float64))
    assert np.allclose(blurred[0, 0].numpy(), expected, atol=1e-12)


def test_each_image_has_its_own_sigma_and_zero_is_exactly_nothing() -> None:
    image = torch.rand(3, 3, 8, 8) * 2 - 1
    blurred = gaussian_blur(image, torch.tensor([0.0, 0.4, 0.6]))
    assert torch.equal(blurred[0], image[0])
    alone = gaussian_blur(image[2:], torch.tensor([0.6]))
    assert torch.equal(blurred[2:], alone)
    roughness = (blurred.diff(dim=3) ** 2).mean((1, 2, 3)) / (image.diff(dim=3) ** 2).mean(
        (1, 2, 3)
    )
    assert 1 == roughness[0] > roughness[1] > roughness[2]


def test_blur_keeps_flat_images() -> None:
    flat = torch.full((1, 3, 6, 6), 0.7)
    assert torch.allclose(gaussian_blur(flat, torch.tensor([0.6])), flat)


def test_augmentation_keeps_variance_and_zero_is_exactly_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 3, 64, 64, generator=generator)
    noise = torch.randn(3, 3, 64, 64, generator=generator)
    noised = augment(image, torch.tensor([0.0, 0.6, 1.0]), noise)
    assert torch.equal(noised[0], image[0])
    assert torch.allclose(noised[1], 0.8 * image[1] + 0.6 * noise[1], atol=1e-6)
    assert torch.equal(noised[2], noise[2])
    assert torch.allclose(noised.var((1, 2, 3)), torch.ones(3), atol=0.05)
