"""One step of a U-Net's path: residual block, attention, cross-attention, resampling.

Notation: B batch, C channels, H W pixels, L tokens, D width of the text, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from diff_dalle.models.attention import CrossAttention, SelfAttention, Text
from diff_dalle.models.layers import Downsample, ResBlock, Upsample

Resample = ResBlock | Downsample | Upsample
"""What doubles or halves the size: a residual block, or a convolution."""

_aten = torch.ops.aten
# What selective checkpointing keeps: products, which cost FLOPs. Norms, activations, dropout
# and the attention weights (quadratic in memory) are cheap and are computed again.
_KEPT = frozenset(
    [
        _aten.convolution.default,
        _aten.addmm.default,
        _aten.mm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    ]
)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep the result of an operator in `_KEPT`; `torch.utils.checkpoint` fixes the signature."""
    keep = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


class Block(nn.Module):
    """The modules between two skip connections of a U-Net, each of them optional.

    Args:
        before: a module that changes the size, at the start.
        res: the residual block.
        attention: self-attention after it.
        cross: cross-attention after that.
        resample: a residual block that changes the size, or a plain resampling, at the end.
        use_checkpoint: keep only convolutions' and products' results for the backward pass.
    """

    def __init__(
        self,
        *,
        before: Resample | None = None,
        res: ResBlock | None = None,
        attention: SelfAttention | None = None,
        cross: CrossAttention | None = None,
        resample: Resample | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.before = before
        self.res = res
        self.attention = attention
        self.cross = cross
        self.resample = resample

    def forward(
        self, x: Tensor, embedding: Tensor, text: Text | None, bias: Tensor | None
    ) -> Tensor:
        """Features [B,C,H,W], embedding [B,E], text [B,L,D], padding bias [B,1,1,L]."""
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return self._run(x, embedding, text, bias)
        return checkpoint(
            self._run, x, embedding, text, bias, use_reentrant=False, context_fn=_contexts
        )

    def _run(self, x: Tensor, embedding: Tensor, text: Text | None, bias: Tensor | None) -> Tensor:
        if self.before is not None:
            x = _resampled(self.before, x, embedding)
        if self.res is not None:
            x = self.res(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None and text is not None:
            x = self.cross(x, text, bias)
        if self.resample is not None:
            x = _resampled(self.resample, x, embedding)
        return x


def _resampled(module: Resample, x: Tensor, embedding: Tensor) -> Tensor:
    """Features in another size; residual blocks alone hear the embedding."""
    return module(x, embedding) if isinstance(module, ResBlock) else module(x)
