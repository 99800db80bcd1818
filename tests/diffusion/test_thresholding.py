"""Thresholds: known answers of Imagen's rule, and what passes through."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import apply_clip
from diff_dalle.diffusion.thresholding import dynamic_threshold, make_clip


def image(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def test_values_are_clipped_to_the_quantile_and_scaled_by_it() -> None:
    """|x_0| = 0, 1, 2, 3, 4: three quarters lie at 3 and below."""
    found = dynamic_threshold(0.75, math.inf)(image(0, -1, 2, -3, 4))
    torch.testing.assert_close(found, image(0, -1, 2, -3, 3) / 3)


def test_the_quantile_is_interpolated_as_torch_does() -> None:
    x_0 = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double() * 2
    s = torch.quantile(x_0.abs().flatten(1), 0.9, dim=1).reshape(3, 1, 1, 1)
    assert (s > 1).all()
    wanted = x_0.clamp(min=-s, max=s) / s
    torch.testing.assert_close(dynamic_threshold(0.9, math.inf)(x_0), wanted)


def test_the_bound_limits_the_scale() -> None:
    found = dynamic_threshold(1.0, 1.5)(image(0.3, -6, 3))
    torch.testing.assert_close(found, image(0.2, -1, 1))


def test_estimates_in_range_pass_and_each_sample_counts_alone() -> None:
    calm, wild = image(0.5, -0.9, 0.1), image(0.5, -9.0, 4.0)
    found = dynamic_threshold(0.995, math.inf)(torch.cat([calm, wild]))
    assert torch.equal(found[:1], calm)
    torch.testing.assert_close(found[1:], dynamic_threshold(0.995, math.inf)(wild))


def test_half_precision_stays() -> None:
    assert dynamic_threshold(0.9, 2.0)(image(3, -2, 1).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("none", (-4, 0.5, 2)), ("static", (-1, 0.5, 1)), ("dynamic", (-1, 0.125, 0.5))],
)
def test_names(name: str, wanted: tuple[float, ...]) -> None:
    found = apply_clip(image(-4, 0.5, 2), make_clip(name, 1.0))
    torch.testing.assert_close(found, image(*wanted))
