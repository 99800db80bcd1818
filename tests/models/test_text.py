"""The text encoder: padding, word order, initialisation, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diff_dalle.errors import UsageError
from diff_dalle.models.text import TextEncoder, TextEncoderConfig, masked_mean, masked_sum

Perturb = Callable[[nn.Module], nn.Module]
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


def test_padding_tokens_change_nothing(encoder: TextEncoder, perturb: Perturb) -> None:
    perturb(encoder)  # in a new one no token hears another
    tokens, mask = _captions()
    other = torch.where(mask, tokens, 49 - tokens)
    assert torch.equal(encoder(other, mask), encoder(tokens, mask))


def test_more_padding_changes_nothing(encoder: TextEncoder, perturb: Perturb) -> None:
    perturb(encoder)
    tokens, mask = _captions()
    longer = torch.cat([tokens, torch.full((3, 6), 7)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(3, 6, dtype=torch.bool)], dim=1)
    text = encoder(longer, longer_mask)
    assert torch.allclose(text[:, :6], encoder(tokens, mask), atol=1e-5)
    assert torch.equal(text[:, 6:], torch.zeros(3, 6, 64))


def test_a_row_of_padding_is_zero_and_has_finite_gradients(
    encoder: TextEncoder, perturb: Perturb
) -> None:
    perturb(encoder)
    tokens, mask = _captions()
    mask[2] = False
    text = encoder(tokens, mask)
    assert torch.equal(text[2], torch.zeros(6, 64))
    assert torch.equal(masked_mean(text, mask)[2], torch.zeros(64))
    text.square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name


def test_real_tokens_are_heard_everywhere(encoder: TextEncoder, perturb: Perturb) -> None:
    perturb(encoder)
    tokens, mask = _captions()
    other = tokens.clone()
    other[0, 5] = 3 if tokens[0, 5] != 3 else 4
    difference = (encoder(other, mask) - encoder(tokens, mask))[0].norm(dim=1)
    assert (difference[:5] > 0.01).all()  # earlier tokens hear a later one: no causal mask


def _steps_to_tell_order(position_std: float | None) -> float:
    """Share of right answers to "does word 3 come before word 4?" in steps 50 to 60."""
    torch.manual_seed(0)
    encoder = TextEncoder(replace(CFG, enc_depth=2))
    if position_std is not None:
        nn.init.normal_(encoder.positions, std=position_std)
    head = nn.Linear(64, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(64, 8, dtype=torch.bool)
    right = []
    for _ in range(60):
        tokens = torch.randint(5, 50, (64, 8), generator=generator)
        place = torch.rand(64, 8, generator=generator).argsort(1)[:, :2]
        tokens.scatter_(1, place, torch.tensor([[3, 4]]).expand(64, 2))
        before = place[:, 0] < place[:, 1]
        answer = head(masked_sum(encoder(tokens, mask), mask))[:, 0]
        right.append(((answer > 0) == before).float().mean().item())
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(answer, before.float()).backward()
        optimizer.step()
    return sum(right[50:]) / 10


def test_word_order_is_learned_at_once() -> None:
    assert _steps_to_tell_order(None) > 0.9
    assert _steps_to_tell_order(0.02) < 0.65  # the usual places are drowned by the words


def test_a_new_encoder_is_a_bag_of_words(encoder: TextEncoder) -> None:
    """Whatever the words around it, a word has its own features before training."""
    tokens, mask = _captions()
    other = tokens.clone()
    other[0, 5] = 3 if tokens[0, 5] != 3 else 4
    assert torch.equal(encoder(other, mask)[0, :5], encoder(tokens, mask)[0, :5])


def test_the_sum_of_words_is_as_loud_for_any_number() -> None:
    text = torch.randn(500, 16, 64, generator=torch.Generator().manual_seed(0))
    for count in (1, 4, 16):
        mask = (torch.arange(16) < count).expand(500, 16)
        hidden = text.masked_fill(~mask[:, :, None], 9.0)
        pooled = masked_sum(hidden, mask)
        assert pooled.std().item() == pytest.approx(1.0, rel=0.03)
        torch.testing.assert_close(pooled, masked_mean(hidden, mask) * count**0.5)
    assert torch.equal(masked_sum(text, torch.zeros(500, 16).bool()), torch.zeros(500, 64))


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


def test_bf16_stays_near_fp32(encoder: TextEncoder, perturb: Perturb) -> None:
    perturb(encoder)
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
