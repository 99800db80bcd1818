"""Selective activation checkpointing: the same gradients from fewer kept tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diff_dalle.models.cost import activation_bytes
from diff_dalle.models.generator import Cond, Generator


def _gradients(model: nn.Module, *inputs: object) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)  # dropout draws the same masks in both models
    model(*inputs).square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("layout", ["adm", "efficient"])
def test_gradients_are_those_without_checkpointing(
    layout: str,
    dropout: float,
    text: bool,
    small: Callable[..., Generator],
    perturb: Callable[[nn.Module], nn.Module],
    inputs: tuple[Tensor, Tensor, Cond],
) -> None:
    x, t, cond = inputs
    cond = cond if text else Cond()  # without any condition the ancestors' version crashed
    results = []
    for use_checkpoint in (False, True):
        flags = {"use_checkpoint": use_checkpoint, "dropout": dropout, "unet_layout": layout}
        model = perturb(small({"cond_text": text}, flags)).double().train()
        results.append(_gradients(model, x.double(), t, cond))
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_checkpointing_repeats_no_product(
    small: Callable[..., Generator], inputs: tuple[Tensor, Tensor, Cond]
) -> None:
    flops = []
    for use_checkpoint in (False, True):
        model = small(unet={"use_checkpoint": use_checkpoint}).train()
        with FlopCounterMode(display=False) as counter:
            _gradients(model, *inputs)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_checkpointing_keeps_less(
    small: Callable[..., Generator], inputs: tuple[Tensor, Tensor, Cond]
) -> None:
    plain, lean = (
        activation_bytes(small(unet={"use_checkpoint": flag, "dropout": 0.1}), *inputs)
        for flag in (False, True)
    )
    assert lean < 0.5 * plain
