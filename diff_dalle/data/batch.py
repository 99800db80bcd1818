"""What the loader hands to the training loop: one rank's part of one global batch.

Notation: B batch, H W pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class BadSample(Exception):
    """A sample that cannot be used; the message is one of a few short reasons."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B samples, broken ones included, so that every sample keeps its place in the order.

    Attributes:
        image: uint8 [B,3,H,W], 0 … 255; zeros where ``valid`` is False.
        tokens: int64 [B,L], padded captions; None for a run without text. A broken sample
            carries the empty caption, so that no row consists of padding alone.
        mask: bool [B,L], True at real tokens; None for a run without text.
        valid: bool [B], False for a broken sample and for the padding of an evaluation.
        seed: int64 [B], ``key_of(run seed, epoch, shard, key)``: all noise of a visit derives
            from it; 0 where the key is empty.
        keys: B names of samples; empty for padding, and where a shard changed and its index was
            lost.
        bad: (shard, key, reason) of every broken sample of this batch.
    """

    image: Tensor
    tokens: Tensor | None
    mask: Tensor | None
    valid: Tensor
    seed: Tensor
    keys: list[str]
    bad: list[tuple[str, str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        """B, the broken samples included."""
        return len(self.valid)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``.

        The copy to a CUDA device goes through pinned memory and does not block the host.
        """
        target = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            if target.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(target, non_blocking=True)

        return self._map(move)

    def chunk(self, size: int) -> list[Batch]:
        """Consecutive microbatches of at most ``size`` samples; all of them if ``size`` < 1.

        The tensors are views. ``bad`` goes with the first microbatch, so that a count over
        the microbatches is the count of the batch.
        """
        size = size if size > 0 else max(len(self), 1)
        starts = range(0, max(len(self), 1), size)
        return [self._slice(slice(start, start + size), first=start == 0) for start in starts]

    def _slice(self, part: slice, *, first: bool) -> Batch:
        sliced = self._map(lambda tensor: tensor[part])
        return replace(sliced, keys=self.keys[part], bad=self.bad if first else [])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            image=function(self.image),
            tokens=None if self.tokens is None else function(self.tokens),
            mask=None if self.mask is None else function(self.mask),
            valid=function(self.valid),
            seed=function(self.seed),
        )
