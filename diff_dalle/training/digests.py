"""Fingerprints of tensors, so that a flipped bit is found and named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diff_dalle.distributed import World, all_gather_objects
from diff_dalle.errors import UsageError

_PIECE = 2**28  # bytes hashed at once
REST = "(everything that is no tensor)"


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values, whatever its strides and device."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for first in range(0, len(flat), _PIECE):
        digest.update(flat[first : first + _PIECE].data)
    return digest.hexdigest()


def digests_of(payload: Mapping[str, Any]) -> dict[str, str]:
    """The digest of every tensor in nested dicts and lists, by its path, and one of the rest.

    >>> list(digests_of({"state_dict": {"weight": torch.zeros(2)}, "step": 3}))
    ['state_dict/weight', '(everything that is no tensor)']
    """
    digests = {}
    rest = hashlib.sha256()
    for path, leaf in _leaves(payload, ""):
        if isinstance(leaf, Tensor):
            digests[path] = tensor_digest(leaf)
        else:
            rest.update(f"{path}={leaf!r}\n".encode("utf-8", "surrogatepass"))
    return {**digests, REST: rest.hexdigest()}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every tensor, number, text and empty container, with its path."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}/{index}")
    elif value is None or isinstance(value, (Tensor, bool, int, float, str, Mapping, list, tuple)):
        yield path, value
    else:
        raise TypeError(f"{path} is a {type(value).__name__}: a checkpoint takes plain values only")


def require_same_on_all_ranks(tensors: Iterable[tuple[str, Tensor]], world: World) -> None:
    """Compare tensors bit by bit across the ranks; every rank must call this.

    Raises:
        UsageError: on every rank, naming the first tensor that differs and the ranks.
    """
    if world.size == 1:
        return
    mine = {name: tensor_digest(tensor) for name, tensor in tensors}
    everyone = all_gather_objects(mine, world)
    for name, digest in everyone[0].items():
        apart = [str(rank) for rank, other in enumerate(everyone) if other.get(name) != digest]
        if apart:
            raise UsageError(
                f"{name} on rank {', '.join(apart)} differs from rank 0's, so the ranks have "
                "drifted apart: nothing was saved, resume from the last checkpoint"
            )
