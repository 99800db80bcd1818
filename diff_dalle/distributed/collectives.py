"""What the ranks tell one another; everything is a no-op for one process alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diff_dalle.distributed.world import World

T = TypeVar("T")

_BUCKET_ELEMENTS = 64 * 2**20


def barrier(world: World) -> None:
    """Wait until every rank has come here."""
    if world.size > 1:
        all_gather_objects(None, world)


def broadcast_object(obj: T, world: World) -> T:
    """Rank 0's object, on every rank. The object is pickled."""
    if world.size == 1:
        return obj
    box: list[Any] = [obj]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_gather_objects(obj: T, world: World) -> list[T]:
    """Every rank's object, in the order of the ranks, on every rank."""
    if world.size == 1:
        return [obj]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, obj)
    return gathered


def all_reduce_sum_(tensor: Tensor, world: World) -> Tensor:
    """Add up a tensor over all ranks, in place; the sum is also returned."""
    if world.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather(x: Tensor, world: World) -> Tensor:
    """[B, ...] of every rank, stacked to [N·B, ...] in the order of the ranks, no gradient."""
    if world.size == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world.size)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def all_gather_with_grad(x: Tensor, world: World) -> Tensor:
    """[B, E] of every rank, stacked to [N·B, E]; the gradient is summed over the ranks.

    With a loss L_r on every rank r, backward gives d(Σ_r L_r)/dx: what the other ranks did
    with this rank's rows is counted. B must be the same on every rank.
    """
    if world.size == 1:
        return x
    return _GatherWithGrad.apply(x, world)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(x)
        return all_gather(x, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = all_reduce_sum_(grads[0].contiguous().clone(), ctx.world)  # [N·B, E]
        first = ctx.world.rank * ctx.rows
        return total[first : first + ctx.rows], None


def synchronise_parameters(module: nn.Module, world: World) -> None:
    """Give every rank rank 0's value of every parameter and every buffer."""
    if world.size == 1:
        return
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


def average_gradients_(parameters: Iterable[Tensor], world: World) -> None:
    """Replace every gradient by its mean over the ranks, in few large messages.

    A parameter without a gradient counts as zero, so that ranks that used different
    parameters still send the same messages. Parameters that need no gradient are left out.
    """
    if world.size == 1:
        return
    wanted = [p for p in parameters if p.requires_grad]
    for p in wanted:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in wanted if p.grad is not None]):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        all_reduce_sum_(flat, world).div_(world.size)
        pieces = flat.split([grad.numel() for grad in bucket])
        for grad, piece in zip(bucket, pieces, strict=True):
            grad.copy_(piece.view(grad.shape))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, at most `_BUCKET_ELEMENTS` together (or one larger alone)."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        same = bool(buckets) and buckets[-1][0].dtype == tensor.dtype
        if not same or filled + tensor.numel() > _BUCKET_ELEMENTS:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets
