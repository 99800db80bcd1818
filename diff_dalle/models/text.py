"""Tokens to features: the text encoder that each generator and the CLIP own.

Notation: B batch, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.knobs import knob, require
from diff_dalle.models.attention import attend, padding_bias, split_qkv
from diff_dalle.models.layers import zero_


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Knobs of the text encoder."""

    text_length: int = knob(48, "longest caption in tokens; longer ones are cut, shorter padded")
    enc_attn_dim: int = knob(512, "width of the text encoder")
    enc_depth: int = knob(6, "layers of the text encoder")
    enc_head_channels: int = knob(64, "channels of one attention head of the text encoder")
    dropout_text: float = knob(0.0, "dropout probability inside the text encoder")
    vocab_size: int = knob(0, "number of token ids; 0: taken from the tokenizer")

    def __post_init__(self) -> None:
        require(self.text_length > 0, "text_length", self.text_length, "be positive")
        require(self.enc_attn_dim > 0, "enc_attn_dim", self.enc_attn_dim, "be positive")
        require(self.enc_depth >= 0, "enc_depth", self.enc_depth, "not be negative")
        require(
            self.enc_head_channels > 0 and self.enc_attn_dim % self.enc_head_channels == 0,
            "enc_head_channels",
            self.enc_head_channels,
            f"divide --enc_attn_dim ({self.enc_attn_dim})",
        )
        require(0 <= self.dropout_text < 1, "dropout_text", self.dropout_text, "lie in [0, 1)")
        require(self.vocab_size >= 0, "vocab_size", self.vocab_size, "not be negative")


class TextEncoder(nn.Module):
    """A bidirectional pre-norm Transformer with learned positions.

    Padding never reaches a real position, and its own features are zero.
    """

    def __init__(self, cfg: TextEncoderConfig) -> None:
        super().__init__()
        require(cfg.vocab_size > 0, "vocab_size", cfg.vocab_size, "be the tokenizer's size")
        self.cfg = cfg
        width = cfg.enc_attn_dim
        self.tokens = nn.Embedding(cfg.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(cfg.text_length, width))
        heads = width // cfg.enc_head_channels
        self.layers = nn.ModuleList(
            TextLayer(width, heads, cfg.dropout_text) for _ in range(cfg.enc_depth)
        )
        self.norm = nn.LayerNorm(width)
        # The encoder starts as a bag of words that knows their order: layers begin at zero, and
        # places speak at 0.3 of the words' loudness. Louder places or random layers drown the
        # words, which is what a generator learns first; the usual 0.02 leaves 2 % of the place,
        # and "a red circle on blue" swaps its colours for thousands of steps.
        nn.init.normal_(self.tokens.weight, std=1.0)
        nn.init.normal_(self.positions, std=0.3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode captions.

        Args:
            tokens: int64 [B,L], L at most ``text_length``.
            mask: bool [B,L], True where a token is real.
        Returns:
            [B,L,D], zero where ``mask`` is False.
        """
        length = tokens.shape[1]
        if length > len(self.positions):
            raise ValueError(f"{length} tokens, but text_length is {len(self.positions)}")
        bias = padding_bias(mask)
        x = self.tokens(tokens) + self.positions[:length]  # [B,L,D]
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x).masked_fill(~mask[:, :, None], 0.0)


class TextLayer(nn.Module):
    """Self-attention, then two linear layers, each on a normalised copy of the features.

    Args:
        width: D.
        heads: number of heads, a divisor of ``width``.
        dropout: probability, in [0, 1).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = zero_(nn.Linear(width, width))
        self.norm_2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = zero_(nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.widen):  # unit variance in, unit variance out
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B,L,D] and the `padding_bias` -> [B,L,D]."""
        qkv = split_qkv(self.qkv(self.norm_1(x)), self.heads, new_order=True)  # 3 of [B,L,N,K]
        x = x + self.dropout(self.project(attend(*qkv, bias)))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm_2(x)))))


def masked_sum(text: Tensor, mask: Tensor) -> Tensor:
    """Sum over the n real tokens, divided by √n: [B,L,D], bool [B,L] -> [B,D].

    Of features of variance 1 it has variance 1 for any n. A mean leaves a caption of 16 words a
    quarter of that, and of one word's change a sixteenth: too faint for a network to hear.
    """
    weight = mask.to(text.dtype)[:, :, None]  # [B,L,1]
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1.0).sqrt()


def masked_mean(text: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: [B,L,D], bool [B,L] -> [B,D]; zero for a row of padding."""
    weight = mask.to(text.dtype)[:, :, None]  # [B,L,1]
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1.0)
