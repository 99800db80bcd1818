"""The text encoder: padding, word order, initialisation, precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diff_dalle.errors import UsageError
from diff_dalle.models.text import TextEncoder, TextEncoderConfig, masked_mean

CFG = TextEncoderConfig(
    text_length=12, enc_attn_dim=64, enc_depth=3, enc_head_channels=16, vocab_size=50
)


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(CFG).eval()


def _captions() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(6) < torch.tensor([6, 3, 1])[:, None]


def test_padding_tokens_change_nothing(encoder: TextEncoder) -> None:
    tokens, mask = _captions()
    other = torch.where(mask, tokens, 49 - tokens)
    assert torch.equal(encoder(other, mask), encoder(tokens, mask))


def test_more_padding_changes_nothing(encoder: TextEncoder) -> None:
    tokens, mask = _captions()
    longer = torch.cat([tokens, torch.full((3, 6), 7)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(3, 6, dtype=torch.bool)], dim=1)
    text = encoder(longer, longer_mask)
    assert torch.allclose(text[:, :6], encoder(tokens, mask), atol=1e-5)
    assert torch.equal(text[:, 6:], torch.zeros(3, 6, 64))


def test_a_row_of_padding_is_zero_and_has_finite_gradients(encoder: TextEncoder) -> None:
    tokens, mask = _captions()
    mask[2] = False
    text = encoder(tokens, mask)
    assert torch.equal(text[2], torch.zeros(6, 64))
    assert torch.equal(masked_mean(text, mask)[2], torch.zeros(64))
    text.square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name


def test_real_tokens_are_heard_everywhere(encoder: TextEncoder) -> None:
    tokens, mask = _captions()
    other = tokens.clone()
    other[0, 5] = 3 if tokens[0, 5] != 3 else 4
    difference = (encoder(other, mask) - encoder(tokens, mask))[0].norm(dim=1)
    assert (difference[:5] > 0.01).all()  # earlier tokens hear a later one: no causal mask


def test_word_order_is_heard_from_the_start(encoder: TextEncoder) -> None:
    """Two swapped words change the pooled text about as much as another word does."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 50, (64, 10), generator=generator)
    mask = torch.ones(64, 10, dtype=torch.bool)
    swapped, other = tokens.clone(), tokens.clone()
    swapped[:, [2, 7]] = tokens[:, [7, 2]]
    other[:, 2] = torch.randint(3, 50, (64,), generator=generator)

    def shift(changed: torch.Tensor) -> float:
        difference = masked_mean(encoder(changed, mask) - encoder(tokens, mask), mask)
        return difference.norm(dim=1).mean().item()

    assert shift(swapped) > 0.25 * shift(other)
    embedded = encoder.tokens.weight.std().item(), encoder.positions.std().item()
    assert embedded == pytest.approx((0.7071, 0.7071), rel=0.1)


def test_features_are_of_order_one_at_any_depth() -> None:
    tokens, mask = torch.randint(0, 50, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    for depth in (1, 12):
        encoder = TextEncoder(replace(CFG, enc_depth=depth))
        hidden = encoder.tokens(tokens) + encoder.positions
        bias = torch.zeros(2, 1, 1, 12)
        for layer in encoder.layers:
            hidden = layer(hidden, bias)
        assert 0.7 < hidden.std().item() < 2.0
        assert encoder(tokens, mask).std().item() == pytest.approx(1.0, rel=0.05)


def test_bf16_stays_near_fp32(encoder: TextEncoder) -> None:
    tokens, mask = _captions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = encoder(tokens, mask)
    assert torch.isfinite(text).all()
    assert torch.allclose(text.float(), encoder(tokens, mask), atol=0.15)


def test_mistakes_are_named(encoder: TextEncoder) -> None:
    with pytest.raises(UsageError, match="--vocab_size is 0"):
        TextEncoder(TextEncoderConfig())
    with pytest.raises(UsageError, match="--enc_head_channels is 60: .*512"):
        TextEncoderConfig(enc_head_channels=60)
    with pytest.raises(ValueError, match="13 tokens, but text_length is 12"):
        encoder(torch.zeros(1, 13, dtype=torch.int64), torch.ones(1, 13, dtype=torch.bool))
