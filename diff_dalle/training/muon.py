"""Muon: momentum whose update is made (nearly) orthogonal, for matrices and convolutions.

Jordan et al. 2024 ("Muon: An optimizer for hidden layers in neural networks"), with the
update's size matched to AdamW's as in Liu et al. 2025 ("Muon is scalable for LLM training",
section 2.2), so that a learning rate and a weight decay tuned for AdamW serve both.
``torch.optim.Muon`` takes matrices alone, one at a time, in bf16, which CPUs emulate; this
one reshapes convolutions and batches equal shapes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diff_dalle.distributed import World, all_gather

# Jordan et al. 2024: steepest at 0 while singular values stay within about 0.7 ... 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
# From this ratio of columns to rows on, iterating on the Gram matrix costs less (measured on a
# CPU: 76 -> 31 ms for eight convolutions of [128, 128, 3, 3], equal at a ratio of 1.5 to 2).
_GRAM_RATIO = 2.0


class Muon(torch.optim.Optimizer):
    """One momentum buffer a weight; Nesterov's form of it, orthogonalised, is the update.

    Orthogonalising costs as much as some training samples and is the same on every rank, so
    each rank does its share of the weights and all exchange the updates (Liu et al. 2025,
    section 2.3). Momentum stays whole on every rank: a checkpoint fits any number of them.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        world: World | None = None,
    ) -> None:
        """Take weights of 2 or more dimensions, [out, in, ...].

        ``world`` shares the work; every rank must then hold the same gradients. None: alone.

        Raises:
            ValueError: a weight has fewer than 2 dimensions.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._world = world or World()
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon takes matrices and convolutions, not {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.dtype, p.device].append(p)
            for weights in alike.values():
                ahead = self._look_ahead(weights, group["momentum"])
                updates = orthogonalise_shared(ahead, self._world)
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
                for p, update in zip(weights, updates, strict=True):
                    # An orthogonal matrix has entries of RMS 1/√max(out, rest); AdamW's update
                    # about 0.2.
                    scale = 0.2 * math.sqrt(max(update.shape))
                    p.add_(update.view(p.shape), alpha=-group["lr"] * scale)

    def _look_ahead(self, weights: list[Tensor], momentum: float) -> list[Tensor]:
        """Move the momentum of ``weights``; Nesterov's update of each, flattened to [out, rest]."""
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in weights if p.grad is not None]
        buffers = [self.state[p]["momentum"] for p in weights]
        torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        return [update.flatten(1) for update in ahead]


def orthogonalise_shared(matrices: Sequence[Tensor], world: World) -> list[Tensor]:
    """`orthogonalise` of every matrix, each rank working on its share.

    Args:
        matrices: [out, rest] each, of one type and device, the same on every rank.
        world: the ranks; all must call this (a collective).
    Returns:
        As many contiguous matrices of the same shapes, the same on every rank.
    """
    owners = share_out([_cost(*m.shape) for m in matrices], world.size)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, owner in enumerate(owners):
        if owner == world.rank:
            by_shape[tuple(matrices[i].shape)].append(i)
    done: dict[int, Tensor] = {}
    for members in by_shape.values():
        stack = orthogonalise(torch.stack([matrices[i] for i in members]))  # [n, out, rest]
        done.update(zip(members, stack.unbind(), strict=True))
    if world.size == 1:
        return [done[i] for i in range(len(matrices))]
    return _exchange(done, matrices, owners, world)


def _exchange(
    done: dict[int, Tensor], matrices: Sequence[Tensor], owners: Sequence[int], world: World
) -> list[Tensor]:
    """All ranks' results in one message a rank, padded to the longest."""
    sizes = [m.numel() for m in matrices]
    of_rank = [[i for i, o in enumerate(owners) if o == rank] for rank in range(world.size)]
    longest = max(sum(sizes[i] for i in members) for members in of_rank)
    mine = matrices[0].new_zeros(longest)
    filled = 0
    for i in of_rank[world.rank]:
        mine[filled : filled + sizes[i]] = done[i].reshape(-1)
        filled += sizes[i]
    everyones = all_gather(mine, world).view(world.size, longest)
    for row, members in zip(everyones, of_rank, strict=True):
        pieces = row[: sum(sizes[i] for i in members)].split([sizes[i] for i in members])
        done.update(
            (i, piece.view(matrices[i].shape)) for i, piece in zip(members, pieces, strict=True)
        )
    return [done[i] for i in range(len(matrices))]


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank does what, so that all finish at about the same time.

    The dearest task first, to the rank with the least work (Graham 1969's LPT rule): at most a
    third longer than the best division. The same costs give the same answer everywhere.
    """
    work = [0.0] * ranks
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=work.__getitem__)
        work[owners[i]] += costs[i]
    return owners


def _cost(out: int, rest: int) -> float:
    """Multiply-adds of orthogonalising one matrix."""
    short, long = min(out, rest), max(out, rest)
    if long >= _GRAM_RATIO * short:
        return 2 * short**2 * long + 4 * _STEPS * short**3
    return _STEPS * (2 * short**2 * long + short**3)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring every singular value near 1 by five quintic Newton-Schulz steps.

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X (Jordan et al. 2024) = P X with P = aI + bG + cG², G = XXᵀ.

    Args:
        matrices: [n, out, rest], float; computed in fp32 or float64.
    Returns:
        The same shape and type. Zero stays zero.
    """
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]  # spectral norm ≤ 1
    x = _iterate_on_gram(x) if x.shape[2] >= _GRAM_RATIO * x.shape[1] else _iterate(x)
    return (x.mT if tall else x).to(matrices.dtype)


def _iterate(x: Tensor) -> Tensor:
    for _ in range(_STEPS):
        gram = x @ x.mT  # [n, rows, rows]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _iterate_on_gram(x: Tensor) -> Tensor:
    """The same numbers from square products: all P are polynomials of G and commute."""
    gram = x @ x.mT  # [n, rows, rows]
    product = None
    for step in range(_STEPS):
        p = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        p.diagonal(dim1=1, dim2=2).add_(_A)
        product = p if product is None else p @ product
        if step < _STEPS - 1:
            gram = p @ gram @ p
    assert product is not None
    return product @ x
