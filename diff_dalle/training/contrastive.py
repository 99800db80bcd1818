"""The contrastive loss of CLIP over all ranks, and its gradient in chunks that fit memory.

Notation: b rows of one chunk, B rows of one rank, N ranks, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.distributed import (
    World,
    all_gather,
    all_gather_with_grad,
    all_reduce_sum_,
    average_gradients_,
)

C = TypeVar("C")


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    valid: Tensor,
    world: World,
) -> Tensor:
    """Symmetric cross-entropy between pictures and captions (Radford et al. 2021, figure 3).

    Every picture is compared with the captions of all ranks, and every caption with the
    pictures of all ranks. Each rank computes its own rows alone, scaled so that the loss of
    the global batch is the *mean* of the ranks' losses: average the gradients over the
    ranks, as DDP does. A row that is not valid is nobody's negative and has weight 0.

    Args:
        image_features: [B, E], normalised; the same B on every rank.
        text_features: [B, E], normalised.
        logit_scale: the factor on the cosines (not its logarithm), a scalar.
        valid: bool [B].
    Returns:
        This rank's scalar part; 0 where no rank has a valid row.
    """
    images = all_gather_with_grad(image_features, world)  # [N·B, E]
    texts = all_gather_with_grad(text_features, world)  # [N·B, E]
    valid_all = all_gather(valid.to(torch.uint8), world).bool()  # [N·B]
    rows = len(image_features)
    targets = torch.arange(rows, device=valid.device) + world.rank * rows  # [B]
    by_image = _row_losses(logit_scale * image_features @ texts.T, targets, valid, valid_all)
    by_text = _row_losses(logit_scale * text_features @ images.T, targets, valid, valid_all)
    total = valid_all.sum().clamp(min=1)
    return world.size * (by_image + by_text).sum() / (2 * total)


def _row_losses(logits: Tensor, targets: Tensor, valid: Tensor, valid_all: Tensor) -> Tensor:
    """Cross-entropy of each of B rows over the valid of N·B columns; 0 for a row not valid."""
    logits = logits.masked_fill(~valid_all, -torch.inf)  # [B, N·B]
    # A row of infinities has no gradient but NaN, so an invalid row is replaced, not weighted.
    logits = torch.where(valid[:, None], logits, torch.zeros_like(logits))
    losses = F.cross_entropy(logits, targets, reduction="none")  # [B]
    return torch.where(valid, losses, torch.zeros_like(losses))


@dataclass(frozen=True, kw_only=True)
class CachedResult:
    """What a cached step leaves besides the gradients."""

    loss: Tensor  # the mean over the ranks: that of the global batch; a scalar, no gradient
    image_features: Tensor  # [B, E], no gradient
    text_features: Tensor  # [B, E], no gradient


def cached_step(
    model: nn.Module,
    chunks: Sequence[C],
    encode: Callable[[C], tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    world: World,
    *,
    loss_scale: float = 1.0,
) -> CachedResult:
    """Gradients of the loss of the whole batch, in the memory of one chunk.

    Gradient caching (Gao et al. 2021): encode all chunks without a graph, take the loss's
    gradient with respect to the features, then encode each chunk again, with the same
    random numbers, and carry that gradient on into the parameters. Exact for any chunks.

    Uses the bare model, not DDP, whose reducer would fire once a chunk: the gradients are
    averaged over the ranks once, at the end.

    Args:
        model: its parameters receive the gradients; they must have none on entry.
        chunks: the pieces of this rank's batch.
        encode: chunk -> normalised (image [b, E], text [b, E]); it enters autocast itself.
        loss_fn: (image [B, E], text [B, E]) -> this rank's scalar loss, such that the mean
            over the ranks is the loss of the global batch, as in `contrastive_loss`.
        world: whose ranks take part.
        loss_scale: factor on the gradients, for fp16.
    """
    if len(chunks) == 1:
        images, texts = encode(chunks[0])
        loss = loss_fn(images, texts)
        (loss * loss_scale).backward()
    else:
        images, texts, states = _encode_all(chunks, encode)
        loss = loss_fn(images, texts)
        (loss * loss_scale).backward()
        _replay(chunks, encode, images, texts, states)
    average_gradients_(model.parameters(), world)
    total = all_reduce_sum_(loss.detach().clone(), world)
    return CachedResult(
        loss=total / world.size, image_features=images.detach(), text_features=texts.detach()
    )


@torch.no_grad()
def _encode_all(
    chunks: Sequence[C], encode: Callable[[C], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, list[_RandomState]]:
    """Features of all chunks as leaves of a new graph, and the random state before each."""
    states, images, texts = [], [], []
    for chunk in chunks:
        states.append(_RandomState())
        image, text = encode(chunk)
        images.append(image)
        texts.append(text)
    return torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_(), states


def _replay(
    chunks: Sequence[C],
    encode: Callable[[C], tuple[Tensor, Tensor]],
    images: Tensor,
    texts: Tensor,
    states: Sequence[_RandomState],
) -> None:
    """Encode again, with a graph, and push the features' gradients through it."""
    assert images.grad is not None and texts.grad is not None
    first = 0
    for chunk, state in zip(chunks, states, strict=True):
        state.restore()
        image, text = encode(chunk)  # [b, E] each
        rows = slice(first, first + len(image))
        torch.autograd.backward([image, text], [images.grad[rows], texts.grad[rows]])
        first = rows.stop


class _RandomState:
    """torch's generators, CPU and GPU, at one moment: they decide dropout."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
