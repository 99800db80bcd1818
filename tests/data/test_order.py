"""The order is a function of (counts, seed), whole in every epoch and cheap at any position."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from diff_dalle.data.order import Order, Slot, first_samples, rank_batches, spread

COUNTS = [[1], [5], [3, 1, 4, 1, 5], [0, 7, 0, 2, 0], [10] * 30, [1] * 50, [100, 1, 1]]


def walk(order: Order, start: int, count: int) -> list[Slot]:
    return [order.slot(position) for position in range(start, start + count)]


@pytest.mark.parametrize("block", [1, 4, 25, 10_000])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_epoch_visits_every_sample_once(counts: list[int], block: int) -> None:
    samples = sum(counts)
    slots = walk(Order(counts, seed=3, block_samples=block), 0, 4 * samples)
    for epoch in range(4):
        visits = slots[epoch * samples : (epoch + 1) * samples]
        assert {slot.epoch for slot in visits} == {epoch}
        assert sorted(slot.sample for slot in visits) == list(range(samples))


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_a_position_does_not_depend_on_what_was_read_before(block: int) -> None:
    counts = [3, 1, 4, 1, 5, 9, 2, 6]
    whole = walk(Order(counts, seed=0, block_samples=block), 0, 5 * sum(counts))
    jumping = Order(counts, seed=0, block_samples=block)
    for position in np.random.default_rng(0).permutation(len(whole)):
        assert jumping.slot(int(position)) == whole[position]
    for start in range(0, len(whole), 13):
        fresh = Order(counts, seed=0, block_samples=block)
        assert walk(fresh, start, 5) == whole[start : start + 5]


def test_the_order_is_the_same_for_ever() -> None:
    # A change here changes the order of every run that is resumed: do not touch the numbers.
    got = [slot.sample for slot in walk(Order([4, 3, 5], seed=7, block_samples=5), 0, 24)]
    first, second = [0, 2, 10, 9, 8, 11, 1, 3, 7, 6, 5, 4], [6, 1, 4, 5, 3, 2, 0, 11, 7, 9, 10, 8]
    assert got == first + second


@pytest.mark.parametrize("block", [1, 4, 25, 10_000])
@pytest.mark.parametrize("counts", COUNTS)
def test_what_is_needed_is_what_this_block_and_the_next_visit(
    counts: list[int], block: int
) -> None:
    order = Order(counts, seed=3, block_samples=block)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    blocks = [order.block(position) for position in range(4 * sum(counts) + 1)]
    edges = [place for place in range(1, len(blocks)) if blocks[place] != blocks[place - 1]]
    for position in range(0, 2 * sum(counts), 1 + sum(counts) // 20):
        end, beyond = [edge for edge in edges if edge > position][:2]
        expected: dict[tuple[int, int], int] = {}
        for there in range(position, beyond):
            shard = int(shard_of[order.slot(there).sample])
            expected.setdefault((int(there >= end), shard), there - position)
        got = order.needs(position)
        assert got == sorted(got) and len(got) == len(expected)
        assert {(need.blocks, need.shard): need.positions for need in got} == expected


def test_a_block_is_read_from_few_shards() -> None:
    order = Order([10] * 6, seed=0, block_samples=20)
    shards = [{need.shard for need in order.needs(at) if need.blocks == 0} for at in (0, 20, 40)]
    assert [len(own) for own in shards] == [2, 2, 2] and len(set().union(*shards)) == 6


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [slot.sample for slot in walk(Order([50] * 4, seed), 200 * number, 200)]

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(np.array(one) == np.array(other)) < 0.05


def test_shuffling_is_uniform_over_places() -> None:
    # 400 epochs of 10 samples: each (sample, place) pair is expected 40 times.
    order = Order([10], seed=1)
    table = np.zeros((10, 10))
    for position in range(4000):
        table[order.slot(position).sample, position % 10] += 1
    chi_squared = ((table - 40) ** 2 / 40).sum()
    assert chi_squared < 130  # 81 degrees of freedom: exceeded once in 2,000 draws


def test_reading_stays_within_blocks_of_shards() -> None:
    order = Order([100] * 40, seed=0, block_samples=400)
    shards = np.array([slot.sample // 100 for slot in walk(order, 0, 4000)])
    blocks = [set(shards[start : start + 400]) for start in range(0, 4000, 400)]
    assert [len(block) for block in blocks] == [4] * 10
    assert set.union(*blocks) == set(range(40))
    assert blocks[0] != {0, 1, 2, 3}
    # Inside a block the shards are mixed: about 300 of 399 neighbours differ.
    assert 250 < (np.diff(shards[:400]) != 0).sum() < 350


def test_a_hundred_million_samples_cost_nothing_to_enter_anywhere() -> None:
    order = Order([10_000] * 10_000, seed=0)
    order.slot(0)
    start = time.perf_counter()
    slot = order.slot(10**15 + 12_345)
    assert time.perf_counter() - start < 1.0
    assert slot.epoch == 10**7


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_out_each_global_batch(world: int, batch_size: int) -> None:
    ranks = [rank_batches(11, batch_size, rank, world) for rank in range(world)]
    position = 11
    for _ in range(20):
        joined = [place for rank in ranks for place in next(rank)]
        assert joined == list(range(position, position + world * batch_size))
        position += world * batch_size


def test_changing_the_number_of_ranks_loses_nothing() -> None:
    order, position, visited = Order([7, 6], seed=5), 0, []
    for world, steps in ((2, 4), (1, 3), (3, 5)):
        ranks = [rank_batches(position, 2, rank, world) for rank in range(world)]
        for _ in range(steps):
            visited += [order.slot(place) for rank in ranks for place in next(rank)]
        position += steps * 2 * world
    assert visited == walk(Order([7, 6], seed=5), 0, position)


def test_the_first_samples_and_an_even_spread() -> None:
    assert first_samples([3, 4, 5], 0) == [3, 4, 5]
    assert first_samples([3, 4, 5], 5) == [3, 2, 0]
    assert first_samples([3, 4, 5], 99) == [3, 4, 5]
    assert spread(10, 0).tolist() == list(range(10)) == spread(10, 10).tolist()
    assert spread(10, 99).tolist() == list(range(10))
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(0, 4).tolist() == []


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="one sample"):
        Order([0, 0], seed=0)
