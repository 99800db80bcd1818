"""The order of samples: a function of (how many samples each shard has, seed) and nothing else.

Each epoch visits every sample once. The shards are shuffled and cut into blocks of consecutive
shards, and the samples of a block are shuffled, so that reading stays within a few files. A run
is one endless sequence of positions 0, 1, 2 …: global batch k of n ranks with b samples each
holds the positions k·n·b … (k+1)·n·b − 1, and rank r reads the r-th part of them. Batches cross
the edges of epochs. Any position costs the same to find, so a run can start anywhere.

Permutations sort numbers of the counter-based generator Philox (Salmon et al. 2011), whose raw
stream numpy promises to keep; `numpy.random.Generator.permutation` carries no such promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from diff_dalle.keyed_noise import key_of

ORDER_VERSION = 1  # count up when positions come to mean other samples: runs then refuse to go on
BLOCK_SAMPLES = 2**16  # wide enough to mix, narrow enough for the page cache to hold

Integers = NDArray[np.int64]
Cached = TypeVar("Cached")


class Slot(NamedTuple):
    """Which sample is visited, and in which epoch; samples count from 0 over all shards."""

    epoch: int
    sample: int


class Need(NamedTuple):
    """A shard that is visited soon; of two, the smaller one is needed first.

    Attributes:
        blocks: 0 for the block at hand, 1 for the next one.
        positions: until the first visit.
        shard: its number.
    """

    blocks: int
    positions: int
    shard: int


@dataclass(frozen=True)
class _Epoch:
    shards: Integers  # [N] the shards in the order of this epoch
    first: Integers  # [K+1] where each block begins in `shards`
    start: Integers  # [K+1] the position in the epoch at which each block begins


class Order:
    """The sequence of visits of a training run."""

    def __init__(self, counts: Sequence[int], seed: int, block_samples: int = BLOCK_SAMPLES):
        """The order of a dataset whose shard i has ``counts[i]`` samples, one at least in all."""
        self.counts: Integers = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.samples = int(self.counts.sum())
        if self.samples < 1:
            raise ValueError("an order needs one sample at least")
        self._block_samples = block_samples
        self._offsets: Integers = np.concatenate([[0], np.cumsum(self.counts)])
        # Two of each: batches that cross an edge look back and forth.
        self._epochs: dict[int, _Epoch] = {}
        self._blocks: dict[tuple[int, int], Integers] = {}

    def slot(self, position: int) -> Slot:
        """What is visited at a position ≥ 0 of the endless sequence."""
        which, place = self._find(position)
        samples = remember(self._blocks, which, self._shuffle)
        return Slot(which[0], int(samples[place]))

    def block(self, position: int) -> tuple[int, int]:
        """Epoch and number of the block that a position belongs to."""
        return self._find(position)[0]

    def needs(self, position: int) -> list[Need]:
        """The shards of a position's block from there on, and of the next block, soonest first.

        A shard of both, where epochs meet, comes twice.
        """
        which, place = self._find(position)
        here = remember(self._blocks, which, self._shuffle)[place:]
        following = self.block(position + len(here))
        beyond = remember(self._blocks, following, self._shuffle)
        return sorted([*self._first_visits(here, 0, 0), *self._first_visits(beyond, 1, len(here))])

    def _find(self, position: int) -> tuple[tuple[int, int], int]:
        """The block of a position, and the place in it."""
        epoch, place = divmod(position, self.samples)
        plan = remember(self._epochs, epoch, self._plan)
        block = int(np.searchsorted(plan.start, place, side="right")) - 1
        return (epoch, block), place - int(plan.start[block])

    def _first_visits(self, samples: Integers, blocks: int, away: int) -> Iterator[Need]:
        shards = np.searchsorted(self._offsets, samples, side="right") - 1
        found, first = np.unique(shards, return_index=True)
        for shard, place in zip(found.tolist(), first.tolist(), strict=True):
            yield Need(blocks, away + place, shard)

    def _plan(self, epoch: int) -> _Epoch:
        order = permutation(key_of(self.seed, "shards", epoch), len(self.counts))  # [N]
        ends = np.cumsum(self.counts[order])
        starts = ends - self.counts[order]
        # A shard belongs to the block in which it begins; the blocks are about equally large.
        blocks = max(round(self.samples / self._block_samples), 1)
        block_of = starts * blocks // self.samples
        first = np.flatnonzero(np.diff(block_of, prepend=-1))
        return _Epoch(
            shards=order,
            first=np.append(first, len(order)),
            start=np.append(starts[first], self.samples),
        )

    def _shuffle(self, which: tuple[int, int]) -> Integers:
        epoch, block = which
        plan = remember(self._epochs, epoch, self._plan)
        shards = plan.shards[plan.first[block] : plan.first[block + 1]]
        samples = np.concatenate(
            [np.arange(self._offsets[s], self._offsets[s + 1]) for s in shards]
        )
        key = key_of(self.seed, "samples", epoch, block)
        shuffled: Integers = samples[permutation(key, len(samples))]
        return shuffled


def rank_batches(start: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """The positions of one rank's batches, without end.

    Args:
        start: the position of the first global batch, in samples of all ranks together.
        batch_size: samples a rank and step.
        rank: which part of a global batch, 0 … ``world`` − 1.
        world: the number of ranks.
    """
    while True:
        first = start + rank * batch_size
        yield range(first, first + batch_size)
        start += world * batch_size


def first_samples(counts: Sequence[int], limit: int) -> list[int]:
    """The counts of a dataset cut to its first ``limit`` samples; 0 keeps all."""
    if limit < 1:
        return list(counts)
    kept = []
    for count in counts:
        kept.append(min(count, limit))
        limit -= kept[-1]
    return kept


def spread(samples: int, limit: int) -> Integers:
    """At most ``limit`` sample numbers, evenly spread and rising; 0 keeps all.

    The fixed subset of an evaluation: shards are often sorted, so their first ones would not
    speak for all.
    """
    kept = samples if limit < 1 else min(limit, samples)
    return np.arange(kept, dtype=np.int64) * samples // max(kept, 1)


def permutation(key: int, length: int) -> Integers:
    """The numbers 0 … ``length`` − 1 in an order that follows from ``key``, int64 [length]."""
    return np.random.Philox(key=key).random_raw(length).argsort(kind="stable")


Key = TypeVar("Key")


def remember(cache: dict[Key, Cached], key: Key, make: Callable[[Key], Cached]) -> Cached:
    """The cached value, or a new one that takes the place of the oldest of two."""
    if key not in cache:
        value = make(key)
        if len(cache) > 1:
            del cache[next(iter(cache))]
        cache[key] = value
    return cache[key]
