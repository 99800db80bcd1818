"""The efficient layout: what stands where, what it computes, what it costs beside ADM's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.config import GeneratorRun, from_flat, parse_run, to_flat
from diff_dalle.errors import UsageError
from diff_dalle.models.attention import CrossAttention, SelfAttention
from diff_dalle.models.cost import activation_bytes, count_parameters, forward_flops
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.layers import ResBlock
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet import UNet
from diff_dalle.models.unet_config import UNetConfig

Perturb = Callable[[nn.Module], nn.Module]
SMALL: dict[str, object] = {
    "unet_layout": "efficient",
    "image_size": 32,
    "num_channels": 16,
    "num_res_blocks": (1, 2),
    "channel_mult": (1, 2),
    "attention_resolutions": (8,),
    "num_head_channels": 8,
    "dropout": 0.0,
}
CONVOLUTIONS: dict[str, object] = {"attention_resolutions": (), "middle_attention": False}
IMAGENS: dict[str, object] = {  # Imagen's upsampler to 256 px, with fewer blocks at the low levels
    "unet_layout": "efficient",
    "num_channels": 128,
    "num_res_blocks": (2, 4, 4, 4),
    "attention_resolutions": (16,),
    "resblock_updown": False,
}


def _unet(text_dim: int | None = None, **flags: object) -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig(**{**SMALL, **flags}), text_dim=text_dim).eval()  # type: ignore[arg-type]


def _widths(model: nn.Module, kind: type, size: int = 32) -> Counter[int]:
    """How many modules of a kind answer at each width of the feature map."""
    seen: Counter[int] = Counter()
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _m, _a, out: seen.update([out.shape[-1]]))
    model(torch.randn(1, 3, size, size), torch.tensor([5]), torch.randn(1, 3, 8))
    return seen


def test_no_block_works_at_the_full_size() -> None:
    plain = {"resblock_updown": False}
    assert _widths(_unet(8, **plain), ResBlock) == {16: 1 + 1, 8: 2 + 2 + 2}
    # Residual resampling: a block more for each halving and each doubling.
    assert _widths(_unet(8), ResBlock) == {16: 2 + 1 + 1, 8: 6 + 1, 32: 1}
    assert _widths(_unet(8, unet_layout="adm", **plain), ResBlock) == {32: 1 + 2, 16: 2 + 3 + 2}


def test_the_default_levels_are_imagens() -> None:
    for size in (256, 1024):
        cfg = UNetConfig(unet_layout="efficient", image_size=size, num_channels=128)
        assert [cfg.channels(level) for level in range(4)] == [128, 256, 512, 1024]
        assert [cfg.size(level) for level in range(4)] == [size >> n for n in (1, 2, 3, 4)]
        assert cfg.downsampling == 16


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_it_computes_the_plan(updown: bool, scale_shift: bool, perturb: Perturb) -> None:
    """Level by level, written out: halve, blocks; back: skip / sqrt(2), blocks, double."""
    model = perturb(
        _unet(resblock_updown=updown, use_scale_shift_norm=scale_shift, **CONVOLUTIONS)
    ).double()
    x, t = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([5, 900])
    e = F.silu(model.time_embed(t))

    def change(module: nn.Module, h: Tensor) -> Tensor:
        return module(h, e) if updown else module(h)

    def beside(h: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([h, skip / 2**0.5], dim=1)

    down, middle, up = model.down, model.middle, model.up
    h_16 = down[0].res(change(down[0].before, model.stem(x)), e)
    h_8 = down[1].res(change(down[1].before, h_16), e)
    h_8b = down[2].res(h_8, e)
    h = middle[1].res(middle[0].res(h_8b, e), e)
    h = up[0].res(beside(h, h_8b), e)
    h = change(up[1].resample, up[1].res(beside(h, h_8), e))
    h = change(up[2].resample, up[2].res(beside(h, h_16), e))
    expected = model.head(F.silu(model.norm(h)))
    assert (len(down), len(middle), len(up)) == (3, 2, 3)
    assert torch.allclose(model(x, t), expected, rtol=0, atol=1e-12)


def _sizes_of(model: UNet, kind: str) -> list[str]:
    return [
        f"{path}{number}"
        for path in ("down", "middle", "up")
        for number, block in enumerate(getattr(model, path))
        if getattr(block, kind) is not None
    ]


@pytest.mark.parametrize("layout", ["adm", "efficient"])
def test_text_is_read_where_asked(layout: str) -> None:
    size = {"adm": 32, "efficient": 16}[layout]
    flags = {"unet_layout": layout, "num_res_blocks": 1, **CONVOLUTIONS}
    assert _sizes_of(_unet(8, **flags), "cross") == []
    high = _unet(8, **flags, cross_attention_resolutions=(size,))
    low = _unet(8, **flags, cross_attention_resolutions=(size // 2,))
    assert _sizes_of(high, "attention") == _sizes_of(low, "attention") == []
    ups = {"adm": (["up2", "up3"], ["up0", "up1"]), "efficient": (["up1"], ["up0"])}[layout]
    lowest = {"adm": "down2", "efficient": "down1"}[layout]
    assert _sizes_of(high, "cross") == ["down0", *ups[0]]
    assert _sizes_of(low, "cross") == [lowest, "middle0", *ups[1]]
    own = _unet(8, unet_layout=layout, cross_attention_resolutions=())
    assert _sizes_of(own, "cross") == [] != _sizes_of(own, "attention")


def test_it_hears_the_text_that_it_reads(perturb: Perturb) -> None:
    x, t, text = torch.randn(1, 3, 32, 32), torch.tensor([5]), torch.randn(2, 3, 8)
    for sizes, hears in (((8,), True), ((), False)):
        model = perturb(_unet(8, cross_attention_resolutions=sizes))
        one, other = (model(x, t, words[None]) for words in text)
        assert torch.equal(one, other) != hears


def test_an_image_is_a_function_of_itself_alone(perturb: Perturb) -> None:
    model = perturb(_unet(8)).double()
    x, t = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([5, 300, 900])
    text = torch.randn(3, 4, 8, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
    y = model(x, t, text, mask)
    for n in range(3):
        one = slice(n, n + 1)
        alone = model(x[one], t[one], text[one], mask[one])
        assert torch.allclose(alone, y[one], rtol=0, atol=1e-10)


def test_without_attention_operations_grow_as_the_area() -> None:
    def flops(model: UNet, height: int, width: int) -> int:
        return forward_flops(model, torch.empty(1, 3, height, width), torch.empty(1))

    for flags, linear in ((CONVOLUTIONS, True), ({}, False)):
        model = _unet(**flags)
        assert linear != any(isinstance(m, SelfAttention) for m in model.modules())
        one, half_more, four = (flops(model, *s) for s in ((32, 32), (32, 48), (64, 64)))
        assert (four - one == 6 * (half_more - one)) == linear


def _upsampler(flags: dict[str, object]) -> tuple[Generator, tuple[Tensor, Tensor, Cond]]:
    """An upsampler from 64 to 256 px without text, and one picture, on the meta device."""
    stage = GeneratorConfig(cond_text=False, small_size=64, aug_level_cond=False)
    with torch.device("meta"):
        unet = UNetConfig(image_size=256, **flags)  # type: ignore[arg-type]
        low_res = torch.empty(1, 3, 64, 64)
        inputs = torch.empty(1, 3, 256, 256), torch.empty(1), Cond(low_res=low_res)
        return Generator(stage, unet, TextEncoderConfig()), inputs


def test_more_parameters_for_two_fifths_of_adms_operations() -> None:
    adm, inputs = _upsampler({"num_channels": 192, "num_heads": 4})
    efficient, _ = _upsampler(IMAGENS)
    assert count_parameters(adm) == 311_027_910 < count_parameters(efficient) == 367_348_998
    ratio = forward_flops(efficient, *inputs) / forward_flops(adm, *inputs)
    assert ratio == pytest.approx(0.389, abs=0.001)
    assert ratio <= 0.55
    kept = activation_bytes(efficient, *inputs) / activation_bytes(adm, *inputs)
    assert kept == pytest.approx(0.270, abs=0.001)


def test_a_crop_costs_a_fifteenth_of_the_whole_picture() -> None:
    """At the largest preset, the text encoder included, which sees one caption either way."""
    run = parse_run(GeneratorRun, ["--preset", "diff-dalle-1024", "--vocab_size", "100"])
    assert (run.task.crop_size, run.image_size) == (256, 1024)
    with torch.device("meta"):
        model = Generator(run.generator, run.unet, run.text)
        tokens = torch.zeros(1, run.text.text_length, dtype=torch.int64)
    assert not any(isinstance(module, SelfAttention) for module in model.unet.modules())
    assert not any(isinstance(module, CrossAttention) for module in model.unet.modules())

    def step(size: int) -> int:
        cond = Cond(
            tokens=tokens, mask=tokens == 0, low_res=torch.empty(1, 3, size // 4, size // 4)
        )
        return forward_flops(model, torch.empty(1, 3, size, size), torch.empty(1), cond)

    assert 15 * step(256) <= step(1024) < 16 * step(256)


def test_checkpoints_from_before_the_layouts_are_adms() -> None:
    run = parse_run(GeneratorRun, "--image_size 64 --num_res_blocks 3".split())
    assert run.unet.unet_layout == "adm"
    old = to_flat(run)
    assert old["num_res_blocks"] == 3
    for name in ("unet_layout", "cross_attention_resolutions"):
        del old[name]
    assert from_flat(GeneratorRun, old) == run


@pytest.mark.parametrize("depths", ["2,4,8,8", "[2, 4, 8, 8]"])
def test_a_file_may_list_depths_and_sizes(depths: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["image_size: 64", "unet_layout: efficient", f"num_res_blocks: {depths}"]
    path.write_text("\n".join([*lines, "cross_attention_resolutions: [8, 4]"]))
    unet = parse_run(GeneratorRun, ["--config", str(path)]).unet
    assert unet.num_res_blocks == (2, 4, 8, 8)
    assert unet.cross_attention_resolutions == (8, 4)
    path.write_text("cross_attention_resolutions: auto\nnum_res_blocks: 3")
    unet = parse_run(GeneratorRun, ["--config", str(path)]).unet
    assert (unet.num_res_blocks, unet.cross_attention_resolutions) == (3, "auto")


def test_depths_survive_a_checkpoints_configuration() -> None:
    flags = "--image_size 64 --unet_layout efficient --num_res_blocks"
    run = parse_run(GeneratorRun, [*flags.split(), "2,4,8,8"])
    assert run.unet.num_res_blocks == (2, 4, 8, 8)
    assert to_flat(run)["num_res_blocks"] == [2, 4, 8, 8]
    assert from_flat(GeneratorRun, to_flat(run)) == run
    same = parse_run(GeneratorRun, [*flags.split(), "3,3,3,3"])
    assert same == parse_run(GeneratorRun, [*flags.split(), "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"unet_layout": "unet++"}, "--unet_layout is 'unet.*one of adm, efficient"),
        ({"num_res_blocks": (1, 2, 3)}, "--num_res_blocks is .1, 2, 3.*each of the 2 levels"),
        ({"num_res_blocks": (1, 0)}, "--num_res_blocks is .1, 0.: it must be positive"),
        ({"num_res_blocks": 0}, "--num_res_blocks is 0: it must be positive"),
        ({"image_size": 34}, "--image_size is 34: it must be a multiple of 4"),
        ({"cross_attention_resolutions": (32,)}, "--cross_attention_resolutions is.*: 16, 8$"),
    ],
)
def test_mistakes_are_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _unet(**flags)
