"""Sources in fixed shares: exact counts in every block, epochs of their own, any position alike."""

import numpy as np
import pytest

from diff_dalle.data.mixture import BLOCK, Mixture, quotas
from diff_dalle.data.order import Order
from diff_dalle.keyed_noise import key_of

COUNTS = [[30, 70], [5, 0, 15], [200]]
WEIGHTS = [0.7, 0.1, 0.2]


def test_quotas_fill_a_block() -> None:
    assert quotas(WEIGHTS) == [700, 100, 200]
    assert quotas([1, 1, 1]) == [334, 333, 333]
    assert quotas([7]) == [BLOCK]
    assert quotas([1e-9, 1]) == [0, BLOCK]


def test_every_block_holds_exact_counts_in_an_order_of_its_own() -> None:
    mixture = Mixture(COUNTS, WEIGHTS, seed=3)
    sizes = np.cumsum([sum(own) for own in COUNTS])
    patterns = set()
    for block in (0, 1, 7, 10**9):
        slots = [mixture.slot(block * BLOCK + place) for place in range(BLOCK)]
        sources = np.searchsorted(sizes, [slot.sample for slot in slots], side="right")
        assert np.bincount(sources).tolist() == [700, 100, 200]
        patterns.add(tuple(sources.tolist()))
    assert len(patterns) == 4


def test_each_source_follows_its_own_order_through_its_own_epochs() -> None:
    mixture = Mixture(COUNTS, WEIGHTS, seed=3)
    slots = [mixture.slot(position) for position in range(3 * BLOCK)]
    first = 0
    for source, own in enumerate(COUNTS):
        size = sum(own)
        visits = [slot for slot in slots if first <= slot.sample < first + size]
        alone = Order(own, key_of(3, "source", source))
        expected = [alone.slot(position) for position in range(len(visits))]
        assert [(s.epoch, s.sample - first) for s in visits] == [tuple(s) for s in expected]
        assert visits[-1].epoch == (len(visits) - 1) // size
        first += size


@pytest.mark.parametrize("position", [0, 1, 999, 1000, 1234, 2999])
def test_visits_are_counted_at_any_position(position: int) -> None:
    mixture = Mixture(COUNTS, WEIGHTS, seed=0)
    sizes = np.cumsum([sum(own) for own in COUNTS])
    samples = [mixture.slot(p).sample for p in range(position)]
    seen = np.bincount(np.searchsorted(sizes, samples, side="right"), minlength=3)
    assert mixture.visits(position) == seen.tolist()


@pytest.mark.parametrize("position", [0, 1, 999, 2_345])
def test_the_shards_of_all_sources_are_needed(position: int) -> None:
    counts = [[300, 700], [50, 0, 150], [1000]]
    mixture = Mixture(counts, WEIGHTS, seed=3)
    alone = [Order(own, key_of(3, "source", source)) for source, own in enumerate(counts)]
    begun = mixture.visits(position)
    assert mixture.block(position) == tuple(map(Order.block, alone, begun))
    got = mixture.needs(position)
    expected = {
        (need.blocks, first + need.shard): order.block(visits)[0] + need.blocks
        for first, order, visits in zip([0, 2, 5], alone, begun, strict=True)
        for need in order.needs(visits)
    }
    assert got == sorted(got) and {(need.blocks, need.shard) for need in got} == {*expected}
    slots = [mixture.slot(p) for p in range(position, position + 11 * BLOCK)]
    shard_of = np.repeat(np.arange(6), [count for own in counts for count in own])
    ahead = [(slot.epoch, shard_of[slot.sample]) for slot in slots]
    for blocks, positions, shard in got:
        # A block of so few samples is an epoch. Places in a block of the mixture are drawn.
        visited = ahead.index((expected[blocks, shard], shard))
        assert abs(visited - positions) < BLOCK
