"""Helpers of the models' tests: random weights, small generators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig


@pytest.fixture
def perturb() -> Callable[[nn.Module], nn.Module]:
    """Fill a module with random weights, the zero-initialised ones included."""

    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in module.parameters():
                width = weight[0].numel() ** 0.5 if weight.ndim > 1 else 4.0
                noise = torch.randn(weight.shape, generator=generator) / width
                weight.copy_(noise if weight.ndim > 1 else weight + noise)
        return module

    return fill


@pytest.fixture
def small() -> Callable[..., Generator]:
    """A generator of 16 px and 16 channels in evaluation mode; flags override."""

    def build(
        stage: dict[str, object] | None = None, unet: dict[str, object] | None = None
    ) -> Generator:
        torch.manual_seed(0)
        flags: dict[str, object] = {
            "image_size": 16,
            "num_channels": 16,
            "num_res_blocks": 1,
            "channel_mult": (1, 2),
            "attention_resolutions": (8,),
            "num_head_channels": 8,
            "dropout": 0.0,
        }
        text = TextEncoderConfig(
            text_length=8, enc_attn_dim=16, enc_depth=2, enc_head_channels=8, vocab_size=20
        )
        cfg = GeneratorConfig(**(stage or {}))  # type: ignore[arg-type]
        return Generator(cfg, UNetConfig(**{**flags, **(unet or {})}), text).eval()  # type: ignore[arg-type]

    return build


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Cond]:
    """A noised image [3,3,16,16], timesteps [3], and captions of 6, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 16, 16, generator=generator)
    tokens = torch.randint(3, 20, (3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    return x, torch.tensor([3, 400, 999]), Cond(tokens=tokens, mask=mask)
