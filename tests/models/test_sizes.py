"""Pictures that are not square, and sizes that are no powers of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.models.generator import Cond, Generator
from diff_dalle.models.layers import Downsample, Upsample

Inputs = tuple[Tensor, Tensor, Cond]
Small = Callable[..., Generator]
Perturb = Callable[[nn.Module], nn.Module]
FLAGS = {"image_size": 24, "channel_mult": (1, 2), "attention_resolutions": (12,)}


def _turned(picture: Tensor) -> Tensor:
    return picture.transpose(2, 3)


def _turn(model: nn.Module) -> None:
    """Exchange rows and columns of every convolution's kernel, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.copy_(_turned(module.weight).clone())


@pytest.mark.parametrize("layout", ["adm", "efficient"])
@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("small_size", [0, 8])
def test_a_turned_network_makes_the_turned_picture(
    layout: str, updown: bool, small_size: int, small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    """24 x 40 px and 40 x 24 px, from 8 x 13 and 13 x 8: rows and columns are never mixed up."""
    _, t, cond = inputs
    flags = {**FLAGS, "unet_layout": layout, "resblock_updown": updown}
    model = perturb(small({"small_size": small_size}, flags)).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 3, 24, 40, generator=generator, dtype=torch.float64)
    turned = cond
    if small_size:
        low_res = torch.randn(3, 3, 8, 13, generator=generator, dtype=torch.float64)
        cond, turned = (replace(cond, low_res=p) for p in (low_res, _turned(low_res)))
    y = model(x, t, cond)
    assert y.shape == (3, 6, 24, 40)
    assert not torch.allclose(model(_turned(x), t, turned), _turned(y), atol=1e-3)
    _turn(model)
    assert torch.allclose(model(_turned(x), t, turned), _turned(y), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("layout", "patch_size", "multiple"), [("adm", 1, 2), ("efficient", 1, 4), ("efficient", 2, 8)]
)
def test_the_multiple_is_named(
    layout: str, patch_size: int, multiple: int, small: Small, inputs: Inputs
) -> None:
    _, t, cond = inputs
    flags = {"unet_layout": layout, "patch_size": patch_size, "attention_resolutions": ()}
    model = small({"small_size": 8}, {**FLAGS, **flags})
    cond = replace(cond, low_res=torch.zeros(3, 3, 8, 8))
    for height, width in ((multiple, 3 * multiple), (2 * multiple, multiple)):
        assert model(torch.zeros(3, 3, height, width), t, cond).shape[2:] == (height, width)
        wrong = f"x is {height} x {width + 1} px: both must be multiples of {multiple}$"
        with pytest.raises(ValueError, match=wrong):
            model(torch.zeros(3, 3, height, width + 1), t, cond)


@pytest.mark.parametrize("layout", ["adm", "efficient"])
def test_places_are_stretched_to_another_size(
    layout: str, small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    """Attention hears them at a size that it was not trained on too."""
    _, t, cond = inputs
    flags = {**FLAGS, "unet_layout": layout, "attention_positions": True}
    model = perturb(small(unet=flags))
    x = torch.randn(3, 3, 24, 40)
    y = model(x, t, cond)
    assert y.shape == (3, 6, 24, 40)
    tables = [weight for name, weight in model.named_parameters() if name.endswith("table")]
    assert len(tables) >= 4
    with torch.no_grad():
        for table in tables:
            table.copy_(table.flip(3))
    assert (model(x, t, cond) - y).abs().max() > 1e-3


def test_resampling_halves_and_doubles_each_axis() -> None:
    x = torch.randn(1, 2, 6, 10)
    assert Downsample(2)(x).shape == (1, 2, 3, 5)
    assert Upsample(2)(x).shape == (1, 2, 12, 20)
