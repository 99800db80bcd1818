"""Costs against published numbers and small cases worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.models.clip import CLIPConfig, ImageEncoder
from diff_dalle.models.cost import activation_bytes, count_parameters, forward_flops, training_bytes
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig


@pytest.mark.parametrize(
    ("flags", "small_size", "giga_macs"),
    [
        ({"image_size": 64, "num_channels": 192, "num_res_blocks": 3}, 0, 109.68),
        ({"image_size": 128, "num_channels": 256}, 0, 306.93),
        ({"image_size": 256, "num_channels": 256}, 0, 1119.83),
        ({"image_size": 512, "num_channels": 256}, 0, 1982.33),
        ({"image_size": 256, "num_channels": 192}, 64, 631.64),
        ({"image_size": 512, "num_channels": 192}, 128, 2504.78),
    ],
)
def test_operations_of_adm(flags: dict[str, int], small_size: int, giga_macs: float) -> None:
    stage = GeneratorConfig(cond_text=False, small_size=small_size, aug_level_cond=False)
    size = flags["image_size"]
    with torch.device("meta"):
        unet = UNetConfig(**flags).canonical(upsampler=small_size > 0)
        model = Generator(stage, unet, TextEncoderConfig())
        low_res = torch.empty(1, 3, small_size, small_size) if small_size else None
        inputs = torch.empty(1, 3, size, size), torch.empty(1), Cond(low_res=low_res)
    assert forward_flops(model, *inputs) / 2e9 == pytest.approx(giga_macs, abs=0.005)


@pytest.mark.parametrize(
    ("size", "depth", "giga_macs"),
    [(64, 4, 19.08), (128, 2, 21.04), (256, 2, 73.35), (512, 2, 112.77)],
)
def test_operations_of_adms_classifiers(size: int, depth: int, giga_macs: float) -> None:
    """Ours pools with one query, ADM's with one a position, of which it reads the first alone."""
    width, positions, classes = 512, 8 * 8 + 1, 1000
    with torch.device("meta"):
        half = CLIPConfig(image_size=size, classifier_depth=depth).image_half()
        encoder = ImageEncoder(half, out_channels=classes)
        inputs = torch.empty(1, 3, size, size), torch.empty(1)
    one = width * width + 2 * positions * width + width * classes  # projected, answered, projected
    unread = (positions - 1) * one / 1e9
    assert forward_flops(encoder, *inputs) / 2e9 + unread == pytest.approx(giga_macs, abs=0.005)


def test_a_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 5, bias=False))
    x = torch.zeros(3, 10)
    assert count_parameters(model) == 10 * 20 + 20 + 20 * 5
    assert forward_flops(model, x) == 2 * 3 * (10 * 20 + 20 * 5)
    # For the backward pass SiLU keeps its input and the second layer its own; then the result.
    assert activation_bytes(model, x) == 4 * 3 * (20 + 20 + 5)
    assert training_bytes(model, x, ema_rates=2) == 4 * 6 * 320 + 4 * 3 * 45


def test_counting_leaves_the_model_alone(
    small: Callable[..., Generator], inputs: tuple[Tensor, Tensor, Cond]
) -> None:
    model = small()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert 0 < forward_flops(model, *inputs) < activation_bytes(model, *inputs) * 1000
    assert not model.training
    assert all(weight.device.type == "cpu" for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_cost_grows_with_the_batch(
    small: Callable[..., Generator], inputs: tuple[Tensor, Tensor, Cond]
) -> None:
    x, t, cond = inputs
    assert cond.tokens is not None and cond.mask is not None
    twice = Cond(tokens=cond.tokens.repeat(2, 1), mask=cond.mask.repeat(2, 1))
    double = x.repeat(2, 1, 1, 1), t.repeat(2), twice
    model = small()
    assert forward_flops(model, *double) == 2 * forward_flops(model, *inputs)
    kept = activation_bytes(model, *inputs)
    assert activation_bytes(model, *double) == pytest.approx(2 * kept, rel=0.01)
