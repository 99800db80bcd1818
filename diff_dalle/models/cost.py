"""What a model costs: parameters, operations, memory, without running it.

Everything is counted on the meta device, where tensors have shapes and no numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

BYTES_FP32 = 4


def count_parameters(module: nn.Module) -> int:
    """The number of trainable and frozen parameters of ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, *inputs: Any) -> int:
    """Floating-point operations of one forward pass, 2 a multiply-add.

    Convolutions, linear layers and attention count; norms and activations do not.

    Args:
        module: on any device; it is neither run nor changed.
        inputs: tensors, dataclasses of tensors (such as `Cond`) or None, on any device; only
            their shapes and dtypes matter. One training step costs about three times as much.
    """
    on_meta = _to_meta(module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(*(_to_meta(value) for value in inputs))
    return counter.get_total_flops()


def activation_bytes(module: nn.Module, *inputs: Any) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, in the given dtypes.

    Arguments as in `forward_flops`. Weights and inputs are not counted; checkpointing is.
    """
    on_meta = _to_meta(module).train()
    on_meta_inputs = [_to_meta(value) for value in inputs]
    with _Allocations() as allocations:
        result = on_meta(*on_meta_inputs)
    kept = allocations.alive()
    del result
    return kept


def sampling_bytes(module: nn.Module, *inputs: Any) -> int:
    """The most bytes that a forward pass without gradient holds at once, its result included.

    Arguments as in `forward_flops`. Weights and inputs are not counted, nor are the kernels' own
    buffers.
    """
    on_meta = _to_meta(module)
    on_meta_inputs = [_to_meta(value) for value in inputs]
    with torch.no_grad(), _Peak() as allocations:
        on_meta(*on_meta_inputs)
    return allocations.most


def training_bytes(module: nn.Module, *inputs: Any, ema_rates: int = 1) -> int:
    """An estimate of the memory of one fp32 training step with Adam, in bytes.

    Weights, gradients, two moments and the moving averages, plus `activation_bytes` of
    ``inputs`` (one microbatch). Temporary buffers of the kernels come on top.
    """
    copies = 4 + ema_rates  # weight, gradient, two moments, averages
    return copies * BYTES_FP32 * count_parameters(module) + activation_bytes(module, *inputs)


class _Allocations(TorchDispatchMode):
    """Remembers, weakly, every storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _is_tensor(leaf) and _storage(leaf) not in known:
                self.sizes[_storage(leaf)] = leaf.untyped_storage().nbytes()
        self.note()
        return out

    def note(self) -> None:
        """Told after every operator."""

    def alive(self) -> int:
        """Bytes of the remembered storages that something still holds."""
        return sum(size for storage, size in self.sizes.items() if not storage.expired())


class _Peak(_Allocations):
    """Remembers the most bytes, too, that were held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def note(self) -> None:
        """Forgets what is gone, so that a long run stays small, and takes the peak."""
        self.sizes = {storage: n for storage, n in self.sizes.items() if not storage.expired()}
        self.most = max(self.most, sum(self.sizes.values()))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _to_meta(value: Any) -> Any:
    """A copy of a module, tensor or dataclass of tensors on the meta device."""
    if isinstance(value, nn.Module):
        memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in value.buffers()}
        for weight in value.parameters():
            memo[id(weight)] = nn.Parameter(weight.to("meta"), weight.requires_grad)
        return copy.deepcopy(value, memo)
    if isinstance(value, Tensor):
        return value.to("meta")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _to_meta(getattr(value, f.name)) for f in fields(value)})
    return value
