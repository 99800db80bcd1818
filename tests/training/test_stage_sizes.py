"""One stage of another shape, and in tiles: known answers with a network that sees three pixels."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_tiny import process
from torch import Tensor, nn

from diff_dalle import keyed_noise
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.models.generator import Cond, GeneratorConfig
from diff_dalle.training.stage import StageSettings, sample_stage

KEYS = torch.tensor([11, 22])
SIZE = (24, 40)


class Local(nn.Module):
    """An upsampler (prediction x0) that sees three pixels to each side, and its caption."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = GeneratorConfig(small_size=8, learn_sigma=False)
        self.unet = SimpleNamespace(cfg=SimpleNamespace(downsampling=4))
        torch.manual_seed(0)
        self.look = nn.Conv2d(6, 3, 7, padding=3)
        self.batches: list[tuple[int, ...]] = []

    def encode(self, cond: Cond) -> Cond:
        if cond.text is not None:
            return cond
        assert cond.tokens is not None
        return dataclasses.replace(cond, text=cond.tokens[:, :, None].float())

    def remember(self, cond: Cond) -> Cond:
        return self.encode(cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.low_res is not None and cond.text is not None
        self.batches.append(tuple(x_t.shape))
        said = cond.text[:, 0, 0]
        if cond.drop is not None:
            said = torch.where(cond.drop, torch.zeros_like(said), said)
        large = nn.functional.interpolate(cond.low_res, x_t.shape[2:], mode="bilinear")
        seen = self.look(torch.cat([x_t, large], dim=1))
        return torch.tanh(seen + large * said[:, None, None, None] / 4)


def asked() -> Cond:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.tensor([[1, 1], [2, 2]])
    low_res = torch.rand(2, 3, 6, 10, generator=generator) * 2 - 1
    return Cond(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool), low_res=low_res)


def drawn(
    model: Local, cond: Cond, size: int | tuple[int, int] = SIZE, batch: int = 1, **settings: Any
) -> Tensor:
    return sample_stage(
        model,
        process("x0", learn_sigma=False),
        cond,
        KEYS,
        image_size=size,
        settings=StageSettings(**{"timestep_respacing": "4", "guidance_scale": 2.0, **settings}),
        tile_batch=batch,
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tiles_of_a_local_network_draw_the_whole_picture(sampler: str) -> None:
    """With guidance, and its rescaling by the deviation of the whole prediction."""
    settings = {"sampler": sampler, "guidance_rescale": 0.7, "aug_level": 0.2}
    model = Local()
    whole = drawn(model, asked(), **settings)
    assert {shape[2:] for shape in model.batches} == {SIZE}
    model.batches.clear()
    tiled = drawn(model, asked(), batch=3, tile_size=20, tile_overlap=12, **settings)
    assert {shape[2:] for shape in model.batches} == {(20, 20)}
    assert max(shape[0] for shape in model.batches) == 3
    assert (tiled.int() - whole.int()).abs().max() <= 1
    assert tiled.float().std() > 20


def turned(picture: Tensor) -> Tensor:
    return picture.transpose(2, 3)


@pytest.mark.parametrize("tile", [0, 20])
def test_a_turned_network_draws_the_turned_picture(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 x 40 px and 40 x 24 px, noise turned too."""
    model, cond = Local(), asked()
    settings = {"tile_size": tile, "tile_overlap": 8 if tile else 0, "aug_level": 0.2}
    upright = drawn(model, cond, **settings)
    assert upright.shape == (2, 3, *SIZE)
    normal = keyed_noise.normal

    def turned_noise(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
        return turned(normal(keys, (shape[0], shape[2], shape[1]), stream))

    monkeypatch.setattr(keyed_noise, "normal", turned_noise)
    with torch.no_grad():
        model.look.weight.copy_(turned(model.look.weight).clone())
    assert cond.low_res is not None
    other = dataclasses.replace(cond, low_res=turned(cond.low_res))
    lying = drawn(model, other, SIZE[::-1], **settings)
    assert (turned(lying).int() - upright.int()).abs().max() <= 1


def test_one_number_is_a_square() -> None:
    cond = dataclasses.replace(asked(), low_res=torch.zeros(2, 3, 6, 6))
    assert torch.equal(drawn(Local(), cond, 24), drawn(Local(), cond, (24, 24)))
