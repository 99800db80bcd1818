"""Layers against formulas, float64 and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diff_dalle.models.layers import (
    Downsample,
    GroupNorm,
    Positions,
    ResBlock,
    Upsample,
    double,
    halve,
    sinusoidal_embedding,
)


def test_sinusoidal_embedding_is_the_formula() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0, 17]), 8)
    for i in range(4):
        angle = 17 * 10000 ** (-i / 4)
        assert embedding[1, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert embedding[1, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-5)
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_sinusoidal_embedding_keeps_fractions_and_float64() -> None:
    whole, half = sinusoidal_embedding(torch.tensor([3.0, 3.5]), 8)
    assert not torch.allclose(whole, half)
    assert sinusoidal_embedding(torch.tensor([3.0], dtype=torch.float64), 8).dtype == torch.float64


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (96, 32), (48, 16), (16, 16), (6, 2)])
def test_group_norm_has_32_groups_or_as_many_as_fit(channels: int, groups: int) -> None:
    norm = GroupNorm(channels)
    assert norm.num_groups == groups
    x = torch.randn(2, channels, 4, 4)
    grouped = norm(x).view(2, groups, -1)
    assert torch.allclose(grouped.mean(2), torch.zeros(2, groups), atol=1e-5)
    assert torch.allclose(grouped.var(2, correction=0), torch.ones(2, groups), atol=1e-3)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (12, 4), (7, 1)])
def test_group_norm_has_as_many_groups_as_asked_or_fit(channels: int, groups: int) -> None:
    assert GroupNorm(channels, 8).num_groups == groups


def test_positions_are_added_and_stretch_to_other_sizes() -> None:
    positions = Positions(3, 4)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(positions(x) - x, (x + positions.table) - x)
    with torch.no_grad():
        positions.table.copy_(torch.arange(4.0).expand(1, 3, 4, 4))  # the column's number
    wide = positions(torch.zeros(1, 3, 2, 8))
    expected = (torch.arange(8) / 2 - 0.25).clamp(0, 3)  # edges are held
    assert torch.allclose(wide[0, 0, 0], expected, atol=1e-6)
    assert torch.equal(wide[0, 0, 0], wide[0, 2, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_stays_in_half_precision_under_autocast(dtype: torch.dtype) -> None:
    norm = GroupNorm(16)
    x = (100 + torch.randn(2, 16, 8, 8)).to(dtype)  # a float16 sum of squares would overflow
    with torch.autocast("cpu", dtype=dtype):
        y = norm(x)
    assert y.dtype == dtype
    expected = F.group_norm(x.double(), 16)
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    assert torch.allclose(y.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's autocast needs a GPU")
def test_group_norm_does_not_cast_to_float32_on_a_gpu() -> None:
    norm, x = GroupNorm(32).cuda(), torch.randn(2, 32, 8, 8, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda", dtype=torch.float16):
        assert norm(x).dtype == torch.float16
        assert F.group_norm(x, 32).dtype == torch.float32  # what is avoided


def test_doubling_repeats_and_halving_averages() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert double(x)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert halve(x).item() == 1.5
    assert Upsample(1)(x).shape == (1, 1, 4, 4)
    assert Downsample(1)(x).shape == (1, 1, 1, 1)


def _block(scale_shift: bool, resample: str | None = None, out: int = 32) -> ResBlock:
    return ResBlock(16, out, embedding=8, dropout=0.0, scale_shift=scale_shift, resample=resample)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("resample", "size"), [(None, 4), ("up", 8), ("down", 2)])
def test_a_new_residual_block_is_its_skip(
    scale_shift: bool, resample: str | None, size: int
) -> None:
    block = _block(scale_shift, resample, out=16)
    x = torch.randn(2, 16, 4, 4)
    y = block(x, torch.randn(2, 8))
    skip = {None: x, "up": double(x), "down": halve(x)}[resample]
    assert y.shape == (2, 16, size, size)
    assert torch.equal(y, skip)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_the_embedding_reaches_the_output(scale_shift: bool, perturb) -> None:  # type: ignore[no-untyped-def]
    # 64 channels: with 32, a group is one channel and its norm takes an added constant out again.
    block = perturb(_block(scale_shift, out=64))
    x = torch.randn(1, 16, 4, 4)
    assert not torch.allclose(block(x, torch.zeros(1, 8)), block(x, torch.ones(1, 8)))


def test_channels_last_goes_in_and_comes_out(perturb) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 16, 4, 4)
    for resample in (None, "up", "down"):
        block = perturb(_block(True, resample))
        expected = block(x, torch.ones(2, 8))
        block.to(memory_format=torch.channels_last)
        y = block(x.contiguous(memory_format=torch.channels_last), torch.ones(2, 8))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(y, expected, atol=1e-5)
