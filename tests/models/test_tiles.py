"""Overlapping tiles: what is known of their join, and that no seam is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.models.attention import CrossAttention
from diff_dalle.models.cost import sampling_bytes
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.tiles import Axis, TiledGenerator, count_tiles

Inputs = tuple[Tensor, Tensor, Cond]
Small = Callable[..., Generator]
Perturb = Callable[[nn.Module], nn.Module]
DOUBLE = {"dtype": torch.float64}


class Local(nn.Module):
    """A network that sees ``reach`` pixels to each side, told a small picture and a number."""

    def __init__(self, reach: int, unit: int = 1) -> None:
        super().__init__()
        self.cfg = GeneratorConfig(small_size=8, cond_text=False)
        self.unet = SimpleNamespace(cfg=SimpleNamespace(downsampling=unit))
        torch.manual_seed(reach)
        self.look = nn.Conv2d(6, 6, 2 * reach + 1, padding=reach, **DOUBLE)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.low_res is not None and cond.aug_level is not None
        self.sizes.append(tuple(x_t.shape))
        enlarged = nn.functional.interpolate(cond.low_res, x_t.shape[2:], mode="bilinear")
        seen = self.look(torch.cat([x_t, enlarged], dim=1)).sin()
        return seen * (t * cond.aug_level)[:, None, None, None]


def asked(height: int, width: int, small: tuple[int, int] = (8, 11)) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, height, width, generator=generator, **DOUBLE)
    low_res = torch.randn(2, 3, *small, generator=generator, **DOUBLE)
    cond = Cond(low_res=low_res, aug_level=torch.tensor([0.2, 0.7], **DOUBLE))
    return x, torch.tensor([1.0, 2.0], **DOUBLE), cond


@pytest.mark.parametrize("length", [8, 20, 24, 32, 40, 104])
@pytest.mark.parametrize("overlap", [0, 4, 12, 20])
def test_shares_sum_to_one_and_tiles_lie_on_the_grid(length: int, overlap: int) -> None:
    axis = Axis.cut(length, 24, overlap, 4)
    total = torch.zeros(length, dtype=torch.float64)
    for start, row in zip(axis.starts, axis.weights, strict=True):
        assert start % 4 == 0 and float(row.min()) >= 0
        total[start : start + axis.tile] += row
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)
    ends = [start + axis.tile for start in axis.starts]
    assert axis.starts[0] == 0 and ends[-1] == length
    shared = [end - start for end, start in zip(ends, axis.starts[1:], strict=False)]
    assert all(common >= overlap for common in shared)
    least = 1 if length <= 24 else -(-(length - overlap) // (24 - overlap))
    assert len(axis.starts) == least


def test_a_share_is_smooth_and_ignores_the_end_of_its_tile() -> None:
    """Tiles of 24 that share 12: 3 that do not count, then 6 of sin²."""
    axis = Axis.cut(60, 24, 12, 1)
    steps = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    rise = torch.sin(steps * torch.pi / 2) ** 2
    expected = torch.cat([torch.zeros(3), rise, torch.ones(6), rise.flip(0), torch.zeros(3)])
    assert axis.starts == [0, 12, 24, 36]
    assert torch.allclose(axis.weights[1], expected, rtol=0, atol=1e-12)
    assert torch.equal(axis.weights[0][:12], torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_local_network_answers_as_about_the_whole(batch: int) -> None:
    """It sees a quarter of the overlap to each side; sizes and the small picture are uneven."""
    local = Local(reach=3)
    inputs = asked(40, 53)
    whole = local(*inputs)
    local.sizes.clear()
    tiled = TiledGenerator(local, (40, 53), 24, 12, batch)
    assert torch.allclose(tiled(*inputs), whole, rtol=0, atol=1e-12)
    assert count_tiles((40, 53), 24, 12, 1) == 12 and sum(size[0] for size in local.sizes) == 24
    assert {size[2:] for size in local.sizes} == {(24, 24)}
    assert max(size[0] for size in local.sizes) == min(batch, 24)


def test_a_network_that_sees_further_differs_only_where_tiles_meet() -> None:
    """It sees 5 to each side; pixels that no other tile's end is that near to are exact."""
    local = Local(reach=5)
    inputs = asked(36, 24)
    tiled = TiledGenerator(local, (36, 24), 24, 12)
    with torch.no_grad():
        rows = (tiled(*inputs) - local(*inputs)).abs().amax((0, 1, 3))  # [H]; tiles: 0-23, 12-35
    met = torch.zeros(36, dtype=torch.bool)
    met[12 + 3 : 12 + 5] = met[24 - 5 : 24 - 3] = True
    assert float(rows[~met].max()) < 1e-12 < 1e-3 < float(rows[met].min())


def test_one_tile_is_the_whole_picture(small: Small, perturb: Perturb, inputs: Inputs) -> None:
    x, t, cond = inputs
    model = perturb(small({"small_size": 8}))
    cond = model.encode(replace(cond, low_res=torch.randn(3, 3, 8, 8)))
    tiled = TiledGenerator(model, (16, 16), 32, 8, batch=3)
    assert torch.equal(tiled(x, t, cond), model(x, t, cond))


def test_every_picture_is_told_what_is_its_own(
    small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    """Captions, dropped ones and noise levels stay with their pictures, whatever the batch."""
    _, t, cond = inputs
    model = perturb(small({"small_size": 8}, {"attention_resolutions": ()}))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, 28, 16, generator=generator)
    cond = replace(
        cond,
        low_res=torch.randn(3, 3, 14, 8, generator=generator),
        aug_level=torch.tensor([0.0, 0.5, 0.9]),
        drop=torch.tensor([False, True, False]),
    )
    cond = model.encode(cond)
    together = TiledGenerator(model, (28, 16), 16, 4, batch=5)(x, t, cond)
    for n in range(3):
        told = {name: value for name, value in vars(cond).items() if value is not None}
        own = {name: value[n : n + 1] for name, value in told.items()}
        one = TiledGenerator(model, (28, 16), 16, 4)
        alone = one(x[n : n + 1], t[n : n + 1], Cond(**own))
        assert torch.allclose(together[n : n + 1], alone, rtol=0, atol=1e-5)
    for untold, changed in (({"drop": None}, [1]), ({"aug_level": None}, [1, 2])):
        other = TiledGenerator(model, (28, 16), 16, 4)(x, t, replace(cond, **untold))
        differs = [n for n in range(3) if (other[n] - together[n]).abs().max() > 1e-2]
        assert differs == changed


def steepness(picture: Tensor) -> Tensor:
    """Mean difference of neighbours in a row, [W - 1], in units of its mean over the row."""
    difference = (picture[..., 1:] - picture[..., :-1]).abs().mean((0, 1, 2))
    return difference / difference.mean()


@pytest.mark.parametrize("attention", [(), (8,)])
@pytest.mark.parametrize(("overlap", "seen"), [(0, True), (8, False), (16, False)])
def test_no_seam_is_seen(
    overlap: int, seen: bool, attention: tuple[int, ...], small: Small, perturb: Perturb
) -> None:
    """Where two tiles meet, no column is steeper than columns elsewhere, the picture's ends apart.

    A U-Net of random weights, whose norms and attention see a tile at a time, about smooth
    pictures. The measure sees the seam of tiles that share nothing.
    """
    flags = {"attention_resolutions": attention, "middle_attention": bool(attention)}
    model = perturb(small({"small_size": 8, "cond_text": False}, flags)).double()
    generator = torch.Generator().manual_seed(1)
    width = 2 * 48 - overlap
    low_res = torch.randn(4, 3, 8, 12, generator=generator, **DOUBLE)
    x = nn.functional.interpolate(low_res, (32, width), mode="bicubic")
    tiled = TiledGenerator(model, (32, width), 48, overlap, batch=8)
    with torch.no_grad():
        found = steepness(tiled(x, torch.full((4,), 100.0, **DOUBLE), Cond(low_res=low_res)))
    assert count_tiles((32, width), 48, overlap, 2) == 2
    met = float(found[48 - overlap - 1 : 48].max())
    elsewhere = float(torch.cat([found[4 : 48 - overlap - 1], found[48:-4]]).max())
    assert met > 1.2 * elsewhere if seen else met < 0.9 * elsewhere


@pytest.mark.parametrize("batch", [1, 4])
def test_remembered_text_is_read_once_and_stays_with_its_pictures(
    small: Small, perturb: Perturb, inputs: Inputs, batch: int
) -> None:
    """Two steps of three pictures in six tiles, one caption dropped: as with encoded text."""
    _, t, cond = inputs
    model = perturb(small({"small_size": 8}))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, 28, 16, generator=generator)
    drop = torch.tensor([False, True, False])
    cond = replace(cond, low_res=torch.randn(3, 3, 14, 8, generator=generator), drop=drop)
    tiled = TiledGenerator(model, (28, 16), 16, 4, batch)
    reads = 0

    def count(*_: object) -> None:
        nonlocal reads
        reads += 1

    asking = [module for module in model.modules() if isinstance(module, CrossAttention)]
    for module in asking:
        module.key.register_forward_hook(count)
    remembered = tiled.remember(cond)
    with torch.no_grad():
        for moment in (x, -x):
            expected = tiled(moment, t, tiled.encode(cond))
            reads_before = reads
            assert torch.allclose(tiled(moment, t, remembered), expected, rtol=0, atol=1e-5)
            assert reads - reads_before == (len(asking) if moment is x else 0)


def test_memory_is_that_of_the_tiles(small: Small) -> None:
    """Counted: two of a picture's four tiles at once, or one, beside the answers of all."""
    with torch.device("meta"):
        flags = {"attention_resolutions": (), "middle_attention": False}
        model = small({"small_size": 8, "cond_text": False}, flags)
        t, cond = torch.zeros(1), Cond(low_res=torch.zeros(1, 3, 8, 26))
        x, tile = torch.zeros(1, 3, 32, 104), torch.zeros(1, 3, 32, 32)
    whole, one = sampling_bytes(model, x, t, cond), sampling_bytes(model, tile, t, cond)
    assert one == pytest.approx(whole * 32 / 104, rel=0.05)
    answer = 4 * 32 * 104 * (3 + 6)  # the enlarged small picture, and the join
    for batch in (1, 2):
        tiled = TiledGenerator(model, (32, 104), 32, 8, batch)
        assert batch * one < sampling_bytes(tiled, x, t, cond) < answer + batch * 1.1 * one
