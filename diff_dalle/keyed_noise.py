"""Random numbers that depend on a sample's key alone.

A number is a function of (key, stream, position), never of a generator's state, so a sample
meets the same noise in any batch, on any rank, at any microbatch, after any resume. The
generator is counter-based in the sense of Salmon et al. 2011 ("Parallel random numbers: as
easy as 1, 2, 3"); the mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014).

Notation: B batch; a key is any int64.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key_of(*parts: object) -> int:
    """A non-negative 63-bit key for any printable parts, the same on every machine.

    Names of files that are no UTF-8 (Python spells their bytes as lone surrogates) have keys too.

    >>> key_of(0, 1, "000001") == key_of(0, 1, "000001") != key_of(0, 2, "000001")
    True
    """
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniform(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Uniform numbers in (0, 1).

    Args:
        keys: int64 [B].
        shape: the shape of one sample's numbers; ``()`` for one number a sample.
        stream: which independent sequence of the key to read.
    Returns:
        float32 [B, *shape] on the device of ``keys``.
    """
    bits = _bits(keys, math.prod(shape), stream)
    # 23 bits and a half fit float32's mantissa exactly and keep 0 and 1 out.
    numbers = (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23
    return numbers.reshape(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Standard normal numbers, by the transform of Box and Muller (1958).

    Arguments and result as in `uniform`.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = _bits(keys, pairs, stream)
    radius_uniform = (_shift_right(bits, 32).to(torch.float32) + 0.5) * 2.0**-32
    angle_uniform = (bits & 0xFFFFFFFF).to(torch.float32) * 2.0**-32
    # A uniform that rounds to 1 in float32 gives radius 0, never a NaN.
    radius = torch.sqrt(-2.0 * torch.log(radius_uniform.clamp(max=1.0)))
    angle = 2.0 * math.pi * angle_uniform
    numbers = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return numbers[:, :count].reshape(len(keys), *shape)


def _bits(keys: Tensor, count: int, stream: int) -> Tensor:
    """int64 [B, count] of 64 random bits each."""
    base = _mix(keys.to(torch.int64) + _wrap(_GOLDEN * (stream + 1)))
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    return _mix(base[:, None] + counter[None, :])


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 arithmetic wraps around, as the algorithm needs."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic, so the copies of the sign bit are masked off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """A Python integer as the signed 64-bit integer with the same low bits."""
    return (value + 2**63) % 2**64 - 2**63
