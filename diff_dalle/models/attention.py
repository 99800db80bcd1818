"""Attention: one kernel, the modules that use it, and text that is read many times.

Notation: B batch, C channels, H W pixels, L tokens, D width of the text, N heads, K channels
of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.models.layers import GroupNorm, Positions, zero_

# Added to the score of a padded token. Finite, so that a row that is all padding gives no NaN;
# inside float16's range; and far enough below any score that its softmax weight is exactly 0.
PADDING_SCORE = -30000.0


def padding_bias(mask: Tensor) -> Tensor:
    """The term that hides padding: bool [B,L] -> float32 [B,1,1,L], 0 where a token is real."""
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return bias.masked_fill(~mask, PADDING_SCORE)[:, None, None, :]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

    Args:
        query: [B,Lq,N,K].
        key: [B,L,N,K].
        value: [B,L,N,K].
        bias: float32 [B,1,1,L] added to the scores, or None.
    Returns:
        [B,Lq,N*K].
    """
    # torch's fused kernel on every device. On the CPU (torch 2.13, AVX-512, 1 thread, forward
    # and backward, batch 8 or 16, heads of 16 to 64) it took 0.73 to 0.96 of the time of two
    # matrix products and a softmax at 16 and 64 positions, 0.6 at 1,024, 0.5 at 4,096, and about
    # as long (0.92 to 1.08) against 24 text tokens.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B,N,L,K]
    score_bias = None if bias is None else bias.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=score_bias)
    return out.transpose(1, 2).flatten(2)


def split_qkv(qkv: Tensor, heads: int, *, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cut [B,L,3*C] into query, key and value, each [B,L,N,K].

    ADM knows two layouts of the 3*C channels: new (q, k, v, then heads in each) and legacy
    (heads, then q, k, v in each).
    """
    if new_order:
        query, key, value = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    else:
        query, key, value = qkv.unflatten(2, (heads, 3, -1)).unbind(3)
    return query, key, value


def to_tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,H*W,C]; a view when ``x`` is channels_last."""
    return x.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """ADM's attention block: every position of the image looks at every other.

    Args:
        channels: C.
        heads: N, a divisor of ``channels``.
        new_order: the layout of the joint projection, see `split_qkv`.
        norm_groups: groups of the norm.
        size: H = W of the feature map of a whole image, to learn its places; None: not told.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        new_order: bool,
        *,
        norm_groups: int = 32,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = _norm(channels, norm_groups, size)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zero_(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        qkv = self.qkv(to_tokens(self.norm(x)))  # [B,HW,3C]
        h = attend(*split_qkv(qkv, self.heads, new_order=self.new_order))  # [B,HW,C]
        return x + self.project(h).transpose(1, 2).unflatten(2, x.shape[2:])


class CrossAttention(nn.Module):
    """Every position of the image looks at the text.

    Key and value have projections of their own and no bias: a padded token, whose features are
    zero, then has the value zero, and a row that is all padding adds nothing to the image.

    Args:
        channels: C, channels of the image features, which make the queries.
        heads: N, a divisor of ``channels``.
        text_dim: D, width of the text features, which make keys and values.
        norm_groups: groups of the norm.
        size: H = W of the feature map of a whole image, to learn its places; None: not told.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        text_dim: int,
        *,
        norm_groups: int = 32,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels, norm_groups, size)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(text_dim, channels, bias=False)
        self.value = nn.Linear(text_dim, channels, bias=False)
        self.project = zero_(nn.Linear(channels, channels, bias=False))

    def forward(self, x: Tensor, text: Text, bias: Tensor | None) -> Tensor:
        """Image [B,C,H,W], text [B,L,D] (zero at padding), `padding_bias` -> [B,C,H,W]."""
        query = self.query(to_tokens(self.norm(x))).unflatten(2, (self.heads, -1))  # [B,HW,N,K]
        key, value = text.read_by(self) if isinstance(text, TextMemory) else self.read(text)
        h = attend(query, key, value, bias)  # [B,HW,C]
        return x + self.project(h).transpose(1, 2).unflatten(2, x.shape[2:])

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Text [B,L,D] -> key and value, each [B,L,N,K]."""
        key = self.key(text).unflatten(2, (self.heads, -1))
        return key, self.value(text).unflatten(2, (self.heads, -1))


class TextMemory:
    """Text that many calls read, as the steps of a sampler do: keys and values are kept.

    Every module's are computed when it first asks, without gradients, and under the autocast of
    that moment. They are of the weights of that moment, too.

    Attributes:
        text: [B,L,D], zero at padding.
        mask: bool [B,L], True where a token is real.
        bias: `padding_bias` of the mask.
    """

    def __init__(
        self,
        text: Tensor,
        mask: Tensor,
        read: Callable[[CrossAttention], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.text = text.masked_fill(~mask[:, :, None], 0.0)
        self.mask = mask
        self.bias = padding_bias(mask)
        self._read = read or (lambda attention: attention.read(self.text))
        self._kept: dict[CrossAttention, tuple[Tensor, Tensor]] = {}

    def of(self, numbers: Tensor) -> TextMemory:
        """What is remembered of some captions, int64 on their device; perhaps one repeatedly."""

        def read(attention: CrossAttention) -> tuple[Tensor, Tensor]:
            key, value = self.read_by(attention)
            return key[numbers], value[numbers]

        return TextMemory(self.text[numbers], self.mask[numbers], read)

    def read_by(self, attention: CrossAttention) -> tuple[Tensor, Tensor]:
        """`CrossAttention.read` of the text."""
        if attention not in self._kept:
            with torch.no_grad():
                self._kept[attention] = self._read(attention)
        return self._kept[attention]


Text = Tensor | TextMemory
"""Features of captions [B,L,D], for one call or for many."""


def _norm(channels: int, groups: int, size: int | None) -> nn.Module:
    """What attention reads: normalised features, and where they are."""
    norm = GroupNorm(channels, groups)
    return norm if size is None else nn.Sequential(norm, Positions(channels, size))


class AttentionPool(nn.Module):
    """CLIP's pooling as ADM uses it: the mean of the positions asks all of them.

    Args:
        channels: C.
        size: H = W of the feature map in pixels.
        heads: N, a divisor of ``channels``.
        out_channels: width of the result.
    """

    def __init__(self, channels: int, size: int, heads: int, out_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(size**2 + 1, channels) * channels**-0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,size,size] -> [B,out_channels]."""
        tokens = to_tokens(x)  # [B,HW,C]
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)  # [B,1+HW,C]
        tokens = tokens + self.positions.to(tokens.dtype)
        # Only the mean's answer is read, so only the mean asks: one row of scores, not 1+HW.
        width = tokens.shape[2]
        query = F.linear(tokens[:, :1], self.qkv.weight[:width], self.qkv.bias[:width])
        pair = F.linear(tokens, self.qkv.weight[width:], self.qkv.bias[width:])
        key, value = pair.unflatten(2, (2, self.heads, -1)).unbind(2)  # [B,1+HW,N,K]
        pooled = attend(query.unflatten(2, (self.heads, -1)), key, value)  # [B,1,C]
        return self.project(pooled[:, 0])
