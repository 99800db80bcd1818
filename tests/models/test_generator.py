"""A stage: what it is told and what that changes, gradients, user mistakes, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diff_dalle.errors import UsageError
from diff_dalle.models.attention import TextMemory
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig

Inputs = tuple[Tensor, Tensor, Cond]
Small = Callable[..., Generator]
Perturb = Callable[[nn.Module], nn.Module]
UPSAMPLER = {"small_size": 4}
MEMORY = TextMemory(torch.zeros(3, 6, 16), torch.ones(3, 6, dtype=torch.bool))


def _upsampler_cond(cond: Cond) -> Cond:
    low_res = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return replace(cond, low_res=low_res, aug_level=torch.tensor([0.0, 0.1, 0.2]))


def test_output_channels(small: Small, inputs: Inputs) -> None:
    x, t, cond = inputs
    assert small()(x, t, cond).shape == (3, 6, 16, 16)
    assert small({"learn_sigma": False})(x, t, cond).shape == (3, 3, 16, 16)


def test_an_upsampler_hears_text_picture_and_noise_level(
    small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    x, t, cond = inputs
    model = perturb(small(UPSAMPLER))
    cond = _upsampler_cond(cond)
    assert cond.tokens is not None and cond.low_res is not None
    y = model(x, t, cond)
    for changed in (
        replace(cond, tokens=cond.tokens.flip(1)),
        replace(cond, low_res=-cond.low_res),
        replace(cond, aug_level=torch.tensor([0.3, 0.3, 0.3])),
        replace(cond, drop=torch.tensor([True, True, True])),
    ):
        difference = (model(x, t, changed) - y).flatten(1).norm(dim=1)
        assert (difference > 1e-3).all()
    silent = model(x, t, replace(cond, aug_level=None))
    assert torch.equal(silent, model(x, t, replace(cond, aug_level=torch.zeros(3))))


def test_an_upsampler_works_on_crops(small: Small, perturb: Perturb, inputs: Inputs) -> None:
    x, t, cond = inputs
    model = perturb(small(UPSAMPLER))
    cond = replace(_upsampler_cond(cond), low_res=torch.randn(3, 3, 2, 2))
    assert model(x[:, :, :8, :8], t, cond).shape == (3, 6, 8, 8)


def test_word_order_changes_the_picture(small: Small, perturb: Perturb, inputs: Inputs) -> None:
    x, t, cond = inputs
    assert cond.tokens is not None
    model = perturb(small())
    swapped = cond.tokens[:, [1, 0, 2, 3, 4, 5]]
    difference = model(x, t, replace(cond, tokens=swapped)) - model(x, t, cond)
    assert difference[0].norm() > 1e-3


def test_padding_changes_nothing(small: Small, perturb: Perturb, inputs: Inputs) -> None:
    x, t, cond = inputs
    assert cond.tokens is not None and cond.mask is not None
    model = perturb(small())
    y = model(x, t, cond)
    other = torch.where(cond.mask, cond.tokens, 19)
    assert torch.equal(model(x, t, replace(cond, tokens=other)), y)
    longer = Cond(
        tokens=torch.cat([cond.tokens, torch.full((3, 2), 5)], 1),
        mask=torch.cat([cond.mask, torch.zeros(3, 2, dtype=torch.bool)], 1),
    )
    assert torch.allclose(model(x, t, longer), y, atol=1e-4)
    nothing = replace(cond, mask=torch.zeros(3, 6, dtype=torch.bool))
    assert torch.isfinite(model(x, t, nothing)).all()


def test_a_dropped_caption_is_the_null_embedding(
    small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    x, t, cond = inputs
    assert cond.tokens is not None
    model = perturb(small())
    drop = torch.tensor([True, False, False])
    y = model(x, t, cond)
    dropped = model(x, t, replace(cond, drop=drop))
    assert torch.equal(dropped[1:], y[1:])
    # Which caption was dropped, and how long it was, is not heard.
    changed = replace(cond, drop=drop, tokens=cond.tokens.flip(0), mask=cond.mask.flip(0))
    assert torch.equal(model(x, t, changed)[0], dropped[0])
    with torch.no_grad():
        model.null_text.add_(1)
    assert not torch.allclose(model(x, t, replace(cond, drop=drop))[0], dropped[0])


def test_encoding_once_changes_nothing(small: Small, perturb: Perturb, inputs: Inputs) -> None:
    x, t, cond = inputs
    model = perturb(small())
    encoded = model.encode(cond)
    assert encoded.text is not None and encoded.text.shape == (3, 6, 16)
    assert model.encode(encoded) is encoded
    calls = []
    assert model.text_encoder is not None
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for drop in (None, torch.tensor([True, False, True])):
        with_text = model(x, t, replace(encoded, drop=drop, tokens=None))
        assert calls == []
        assert torch.equal(with_text, model(x, t, replace(cond, drop=drop)))
        calls.clear()


@pytest.mark.parametrize("drop", [None, [True, False, True]])
def test_remembering_changes_nothing_and_reads_once(
    small: Small, perturb: Perturb, inputs: Inputs, drop: list[bool] | None
) -> None:
    x, t, cond = inputs
    cond = replace(cond, drop=None if drop is None else torch.tensor(drop))
    model = perturb(small())
    expected = model(x, t, cond)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("cross.key", "cross.value")) or module is model.text_encoder:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    told = model.remember(cond)
    assert model.remember(told) is told
    for _ in range(3):
        assert torch.equal(model(x, t, told), expected)
    assert len(calls) == len(set(calls)) > 2
    # A picture's gradient is that of the plain call; the weights' is not asked for.
    both = []
    for one in (cond, told):
        seen = x.clone().requires_grad_(True)
        both += torch.autograd.grad(model(seen, t, one).sum(), seen)
    assert torch.equal(*both)
    with pytest.raises(ValueError, match=r"Cond.text was given, but Cond.memory is there"):
        model(x, t, replace(told, text=torch.zeros(3, 6, 16)))


@pytest.mark.parametrize("stage", [{}, UPSAMPLER, {"cond_text": False}])
@pytest.mark.parametrize("drop", [None, [True, False, False]])
@pytest.mark.parametrize("layout", ["adm", "efficient"])
def test_every_parameter_gets_a_gradient(
    layout: str,
    stage: dict[str, object],
    drop: list[bool] | None,
    small: Small,
    perturb: Perturb,
    inputs: Inputs,
) -> None:
    x, t, cond = inputs
    if stage.get("cond_text") is False:
        cond = Cond()
    else:
        cond = replace(cond, drop=None if drop is None else torch.tensor(drop))
    cond = _upsampler_cond(cond) if "small_size" in stage else cond
    model = small(stage, {"unet_layout": layout})
    model(x, t, cond).square().mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    perturb(model).zero_grad()
    model(x, t, cond).square().mean().backward()
    silent = [name for name, weight in model.named_parameters() if not weight.grad.any()]
    assert silent == (["null_text"] if drop is None and cond.tokens is not None else [])


def test_without_text_there_are_no_text_modules(small: Small, inputs: Inputs) -> None:
    x, t, _ = inputs
    model = small({"cond_text": False})
    assert model.text_encoder is None
    assert {name.split(".")[0] for name in model.state_dict()} == {"unet"}
    assert model(x, t, Cond()).shape == (3, 6, 16, 16)
    assert model.encode(Cond()) == model.remember(Cond()) == Cond()


def test_the_noise_level_need_not_be_told(small: Small, inputs: Inputs) -> None:
    x, t, cond = inputs
    model = small({**UPSAMPLER, "aug_level_cond": False, "cond_text": False})
    assert {name.split(".")[0] for name in model.state_dict()} == {"unet"}
    cond = replace(_upsampler_cond(cond), tokens=None, mask=None)
    assert model(x, t, cond).shape == (3, 6, 16, 16)


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ({}, {"tokens": None}, "Cond.tokens is missing"),
        ({}, {"mask": None}, "Cond.mask is missing"),
        ({}, {"low_res": torch.zeros(3, 3, 4, 4)}, "Cond.low_res was given"),
        ({}, {"aug_level": torch.zeros(3)}, "Cond.aug_level was given"),
        (UPSAMPLER, {}, "Cond.low_res is missing"),
        ({"cond_text": False}, {}, "Cond.tokens was given, but cond_text is False"),
        (
            {"cond_text": False},
            {"tokens": None, "mask": None, "memory": MEMORY},
            "Cond.memory was given, but cond_text is False",
        ),
    ],
)
def test_missing_and_needless_fields_are_named(
    stage: dict[str, object],
    fields: dict[str, object],
    message: str,
    small: Small,
    inputs: Inputs,
) -> None:
    x, t, cond = inputs
    with pytest.raises(ValueError, match=message):
        small(stage)(x, t, replace(cond, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("small_size", [16, 32, 5, -4])
def test_a_small_size_that_does_not_fit_is_refused(small: Small, small_size: int) -> None:
    with pytest.raises(UsageError, match=f"--small_size is {small_size}"):
        small({"small_size": small_size})


@pytest.mark.parametrize("layout", ["adm", "efficient"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_whole_stage_is_one_graph(
    layout: str, use_checkpoint: bool, small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    x, t, cond = inputs
    cond = replace(_upsampler_cond(cond), drop=torch.tensor([True, False, False]))
    model = perturb(small(UPSAMPLER, {"use_checkpoint": use_checkpoint, "patch_size": 2,
                                      "unet_layout": layout,
                                      "attention_resolutions": (4,)})).train()  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y = compiled(x, t, cond)
    assert torch.allclose(y, model(x, t, cond), atol=1e-5)
    y.square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_gives_finite_gradients_near_fp32(
    dtype: torch.dtype, small: Small, perturb: Perturb, inputs: Inputs
) -> None:
    x, t, cond = inputs
    cond = replace(_upsampler_cond(cond), drop=torch.tensor([True, False, False]))
    model = perturb(small(UPSAMPLER))
    model(x, t, cond).square().mean().backward()
    exact = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = model(x, t, cond)
    y.float().square().mean().backward()
    close = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert torch.isfinite(close).all()
    assert (close - exact).norm() < (0.06 if dtype == torch.bfloat16 else 0.02) * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_agrees_with_the_cpu(small: Small, perturb: Perturb, inputs: Inputs) -> None:
    x, t, cond = inputs
    cond = replace(_upsampler_cond(cond), drop=torch.tensor([True, False, False]))
    model = perturb(small(UPSAMPLER))
    y = model(x, t, cond)
    there = {f.name: getattr(cond, f.name) for f in fields(cond)}
    moved = Cond(**{name: None if v is None else v.cuda() for name, v in there.items()})
    model.cuda()
    assert torch.allclose(model(x.cuda(), t.cuda(), moved).cpu(), y, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = model(x.cuda(), t.cuda(), moved).cpu()
    assert (low - y).norm() < 0.03 * y.norm()


@pytest.mark.parametrize("layout", ["adm", "efficient"])
def test_a_residual_upsampler_starts_as_interpolation(layout: str) -> None:
    unet = UNetConfig(
        unet_layout=layout,
        image_size=16,
        num_channels=16,
        num_res_blocks=1,
        channel_mult=(1,),
        num_head_channels=16,
        attention_resolutions=(),
        dropout=0.0,
    )
    cfg = GeneratorConfig(cond_text=False, small_size=4, low_res_residual=True)
    generator = Generator(cfg, unet, TextEncoderConfig())
    low_res = torch.rand(2, 3, 4, 4)
    y = generator(torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0]), Cond(low_res=low_res))
    assert y.shape == (2, 6, 16, 16)
    torch.testing.assert_close(y[:, :3], F.interpolate(low_res, (16, 16), mode="bilinear"))
    assert not y[:, 3:].any()
