"""Several sources in fixed shares: which source each position of a run belongs to.

Every block of `BLOCK` consecutive positions holds exactly the same number of samples of each
source, in an order of its own. Each source goes through its own epochs, so a small one with a
large share is simply visited more often. Any position costs the same to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diff_dalle.data.order import Need, Order, Slot, permutation, remember
from diff_dalle.keyed_noise import key_of

BLOCK = 1000

Integers = NDArray[np.int64]


def quotas(weights: Sequence[float]) -> list[int]:
    """How many of `BLOCK` positions each source gets: largest remainders, earlier sources first.

    >>> quotas([2, 1])
    [667, 333]
    """
    total = sum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    given = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: given[i] - exact[i])
    for source in by_remainder[: BLOCK - sum(given)]:
        given[source] += 1
    return given


class Mixture:
    """The sequence of visits of a training run that reads several sources."""

    def __init__(self, counts: Sequence[Sequence[int]], weights: Sequence[float], seed: int):
        """The order over sources of which source i has ``counts[i][j]`` samples in shard j.

        Args:
            counts: of every shard of every source.
            weights: of the sources, in any unit.
            seed: of the run.
        """
        self._orders = [
            Order(own, key_of(seed, "source", source)) for source, own in enumerate(counts)
        ]
        sizes = [order.samples for order in self._orders]
        self._first = np.cumsum([0, *sizes])
        self._first_shard = np.cumsum([0, *map(len, counts)])
        self._quotas = quotas(weights)
        self._seed = seed
        self._blocks: dict[int, tuple[Integers, Integers]] = {}

    def slot(self, position: int) -> Slot:
        """What is visited at a position ≥ 0; samples count over all sources in their order."""
        block, place = divmod(position, BLOCK)
        sources, ranks = remember(self._blocks, block, self._plan)
        source = int(sources[place])
        visit = self._orders[source].slot(block * self._quotas[source] + int(ranks[place]))
        return Slot(visit.epoch, visit.sample + int(self._first[source]))

    def visits(self, position: int) -> list[int]:
        """How many visits each source has had before a position."""
        block, place = divmod(position, BLOCK)
        sources, _ = remember(self._blocks, block, self._plan)
        begun = np.bincount(sources[:place], minlength=len(self._quotas))
        return [block * quota + int(more) for quota, more in zip(self._quotas, begun, strict=True)]

    def block(self, position: int) -> tuple[tuple[int, int], ...]:
        """The block of each source's own order that a position belongs to."""
        begun = self.visits(position)
        return tuple(map(Order.block, self._orders, begun))

    def needs(self, position: int) -> list[Need]:
        """The shards of all sources' blocks and next blocks, as `Order.needs` has them."""
        begun = self.visits(position)
        found = []
        for source, order in enumerate(self._orders):
            stride, first = BLOCK / self._quotas[source], int(self._first_shard[source])
            for blocks, positions, shard in order.needs(begun[source]):
                found.append(Need(blocks, int(positions * stride), first + shard))
        return sorted(found)

    def _plan(self, block: int) -> tuple[Integers, Integers]:
        """The source of each place of a block, and which of that source's places it is."""
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
        ranks = np.concatenate([np.arange(quota) for quota in self._quotas])
        order = permutation(key_of(self._seed, "mixture", block), BLOCK)
        # Ranks rise along the block, so that a source is read in its own order.
        sources = sources[order]
        by_source = sources.argsort(kind="stable")
        placed = np.empty_like(ranks)
        placed[by_source] = ranks
        return sources, placed
