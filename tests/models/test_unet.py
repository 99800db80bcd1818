"""The U-Net: published sizes, levels, crops, folding, text, user mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from diff_dalle.errors import UsageError
from diff_dalle.models.cost import count_parameters
from diff_dalle.models.layers import GroupNorm, Positions
from diff_dalle.models.unet import UNet
from diff_dalle.models.unet_config import UNetConfig

Perturb = Callable[[nn.Module], nn.Module]
SMALL = {
    "image_size": 32,
    "num_channels": 16,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (16,),
    "num_head_channels": 8,
    "dropout": 0.0,
}


def _unet(text_dim: int | None = None, **flags: object) -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig(**{**SMALL, **flags}), text_dim=text_dim).eval()  # type: ignore[arg-type]


# Class-conditional ones have 1000 * 4 * num_channels more: 308,835,270 for the one from 128 to 512.
@pytest.mark.parametrize(
    ("flags", "in_channels", "parameters"),
    [
        ({"num_channels": 192, "num_res_blocks": 3}, 3, 295_136_454),
        ({"image_size": 128, "num_channels": 256}, 3, 420_505_606),
        ({"image_size": 256, "num_channels": 256}, 3, 552_814_086),
        ({"image_size": 512, "num_channels": 256}, 3, 557_973_638),
        ({"image_size": 256, "num_channels": 192}, 6, 311_027_910),
        ({"image_size": 512, "num_channels": 192}, 6, 308_067_270),
    ],
)
def test_parameters_of_adm(flags: dict[str, int], in_channels: int, parameters: int) -> None:
    cfg = UNetConfig(**flags).canonical(upsampler=in_channels == 6)
    with torch.device("meta"):
        model = UNet(cfg, in_channels=in_channels)
    assert count_parameters(model) == parameters


def _sees_places(perturb: Perturb, **flags: object) -> bool:
    """Whether a flat feature map far from every edge leaves attention with any structure."""
    attention = perturb(_unet(8, **flags)).down[2]
    for part in attention.modules():
        if isinstance(part, Positions):
            nn.init.normal_(part.table)
    flat = torch.ones(1, 32, 16, 16)
    text = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    own, cross = attention.attention(flat), attention.cross(flat, text, None)
    return all(out.std(dim=(2, 3)).max().item() > 1e-3 for out in (own, cross))


def test_attention_is_told_the_place_where_asked(perturb: Perturb) -> None:
    assert not _sees_places(perturb)
    assert _sees_places(perturb, attention_positions=True)
    x, t = torch.randn(2, 3, 16, 48), torch.tensor([10.0, 500.0])  # another size than trained on
    model = perturb(_unet(attention_positions=True))
    assert model(x, t).shape == (2, 6, 16, 48)


def test_all_norms_have_the_groups_that_were_asked_for() -> None:
    for groups in (4, 32):
        norms = [m for m in _unet(8, norm_groups=groups).modules() if isinstance(m, GroupNorm)]
        assert len(norms) > 10
        assert {m.num_groups for m in norms} <= {groups, 16}  # 16 channels have at most 16
        assert groups in {m.num_groups for m in norms}


@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024])
def test_default_multipliers_end_at_eight_pixels(size: int) -> None:
    cfg = UNetConfig(image_size=size)
    assert cfg.size(len(cfg.resolved_channel_mult) - 1) == 8


def _places(model: UNet) -> list[tuple[str, int]]:
    return [
        (path, number)
        for path in ("down", "middle", "up")
        for number, block in enumerate(getattr(model, path))
        if block.attention is not None
    ]


def test_attention_sits_where_the_feature_map_has_the_named_size() -> None:
    middle = ("middle", 0)
    down_16, up_16 = ("down", 2), [("up", 0), ("up", 1)]
    assert _places(_unet()) == [down_16, middle, *up_16]
    assert _places(_unet(attention_resolutions=(32,)))[0] == ("down", 0)
    # Folding halves the feature maps: 16 px is now the first level, not the second.
    folded = _places(_unet(patch_size=2))
    assert folded == [("down", 0), middle, ("up", 2), ("up", 3)]
    assert _places(_unet(attention_resolutions=(), middle_attention=False)) == []


def test_without_text_there_are_no_text_modules() -> None:
    assert not [name for name, _ in _unet().named_modules() if "cross" in name.split(".")[-1]]
    with_text = _unet(text_dim=8)
    for path, number in _places(with_text):
        assert getattr(with_text, path)[number].cross is not None


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_any_multiple_of_the_downsampling_is_a_valid_size(
    updown: bool,
    patch_size: int,
    perturb,  # type: ignore[no-untyped-def]
) -> None:
    model = perturb(_unet(resblock_updown=updown, patch_size=patch_size))
    t = torch.tensor([5])
    for height, width in ((32, 32), (8, 24), (64, 4)):
        assert model(torch.randn(1, 3, height, width), t).shape == (1, 6, height, width)
    with pytest.raises(ValueError, match=f"30 x 31 px: both must be multiples of {2 * patch_size}"):
        model(torch.randn(1, 3, 30, 31), t)


def test_a_new_model_predicts_zero_and_all_inputs_count_once_trained(perturb) -> None:  # type: ignore[no-untyped-def]
    model = _unet(text_dim=8)
    x, t, text = torch.randn(2, 3, 32, 32), torch.tensor([5, 5]), torch.randn(2, 4, 8)
    assert torch.equal(model(x, t, text), torch.zeros(2, 6, 32, 32))
    perturb(model)
    mask = torch.ones(2, 4, dtype=torch.bool)
    y = model(x, t, text, mask)
    assert torch.allclose(model(x, t, text), y, atol=1e-5)  # no mask: all tokens are real
    assert not torch.allclose(model(x, t + 1, text, mask), y)
    assert not torch.allclose(model(x, t, text.flip(0), mask), y)
    assert not torch.allclose(model(x, t, text, mask, torch.ones(2, 64)), y)


def test_padding_changes_nothing_even_when_it_is_not_a_number(perturb) -> None:  # type: ignore[no-untyped-def]
    model = perturb(_unet(text_dim=8))
    x, t, text = torch.randn(2, 3, 32, 32), torch.tensor([5, 5]), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, False, False], [False, False, False, False]])
    y = model(x, t, text, mask)
    assert torch.isfinite(y).all()
    poisoned = text.masked_fill(~mask[:, :, None], float("nan"))
    assert torch.equal(model(x, t, poisoned, mask), y)
    longer = torch.cat([text, torch.randn(2, 5, 8)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], dim=1)
    assert torch.allclose(model(x, t, longer, longer_mask), y, atol=1e-4)


def test_folding_keeps_neighbours_together(perturb) -> None:  # type: ignore[no-untyped-def]
    """With a stem and head that copy, the picture comes out as it went in."""
    model = _unet(patch_size=2, attention_resolutions=(), middle_attention=False)
    x = torch.randn(1, 3, 32, 32)
    folded = torch.nn.functional.pixel_unshuffle(x, 2)
    assert folded[0, :4, 0, 0].tolist() == x[0, 0, :2, :2].flatten().tolist()
    seen = []
    model.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.head.register_forward_hook(lambda *_: seen[0].repeat(1, 2, 1, 1))
    assert torch.equal(model(x, torch.tensor([1]))[:, :3], x)


def test_dropout_follows_the_size_of_the_image() -> None:
    assert UNetConfig(image_size=64).resolved_dropout == 0.1
    assert UNetConfig(image_size=256).resolved_dropout == 0.0
    assert UNetConfig(image_size=256, dropout=0.3).resolved_dropout == 0.3
    model = UNet(UNetConfig(**{**SMALL, "dropout": 0.3}))  # type: ignore[arg-type]
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}


def test_features_stay_in_channels_last(perturb) -> None:  # type: ignore[no-untyped-def]
    model = perturb(_unet(text_dim=8))
    strays = []

    def check(module: torch.nn.Module, _: object, out: torch.Tensor) -> None:
        if out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last):
            strays.append(type(module).__name__)

    for module in model.modules():
        if module is not model:
            module.register_forward_hook(check)
    model(torch.randn(2, 3, 32, 32), torch.tensor([5, 5]), torch.randn(2, 4, 8))
    assert strays == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_fp32(dtype: torch.dtype, perturb) -> None:  # type: ignore[no-untyped-def]
    model = perturb(_unet(text_dim=8, image_size=16, attention_resolutions=(8,)))
    x, t, text = torch.randn(2, 3, 16, 16), torch.tensor([5, 900]), torch.randn(2, 4, 8)
    mask = torch.tensor([[True] * 4, [False] * 4])
    y = model(x, t, text, mask)
    with torch.autocast("cpu", dtype=dtype):
        low = model(x, t, text, mask)
    assert low.dtype == torch.float32
    assert (low - y).norm() < (0.03 if dtype == torch.bfloat16 else 0.005) * y.norm()


def test_float64_is_kept_from_end_to_end(perturb) -> None:  # type: ignore[no-untyped-def]
    model = perturb(_unet(text_dim=8))
    x, t, text = torch.randn(1, 3, 32, 32), torch.tensor([5]), torch.randn(1, 4, 8)
    mask = torch.ones(1, 4, dtype=torch.bool)
    y = model(x, t, text, mask)
    precise = model.double()(x.double(), t, text.double(), mask)
    assert precise.dtype == torch.float64
    assert torch.allclose(precise, y.double(), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_channels": 0}, "--num_channels is 0: it must be positive"),
        ({"num_channels": 15, "channel_mult": (1,)}, "--num_channels is 15: it must be even"),
        ({"channel_mult": (1, 0.3)}, "--channel_mult is .* whole numbers of channels"),
        ({"image_size": 33}, "--image_size is 33: it must be a multiple of 2"),
        ({"image_size": 40, "channel_mult": ()}, "--channel_mult is empty and 40 px"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"num_head_channels": 7}, "--num_head_channels is 7: it must divide the 32 channels"),
        ({"num_head_channels": -1, "num_heads": 5}, "--num_heads is 5: it must divide the 32"),
        ({"num_head_channels": 0}, "--num_head_channels is 0"),
        ({"norm_groups": 0}, "--norm_groups is 0: it must be positive"),
        ({"attention_resolutions": (0,)}, "--attention_resolutions is"),
    ],
)
def test_mistakes_are_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _unet(**flags)
