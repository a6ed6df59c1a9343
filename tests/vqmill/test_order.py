"""The order of an epoch, without a store: each row once, uniform, and mixed enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqmill.order import BlockOrder, EpochOrder, Permutation, ascending


@pytest.mark.parametrize("world_size", [1, 8])
def test_batch_means_vary_little_more_than_of_independent_draws(world_size):
    """The worst case, blocks of equal rows, over epochs of a store that is four pools large."""
    batch, block_rows = 256 // world_size, 64
    blocks = 4 * 5 * batch * world_size
    lanes, pool_rows = 32, 5 * block_rows * batch * world_size // 32
    values = np.random.default_rng(0).standard_normal(blocks).repeat(block_rows)
    values -= values.mean()
    ratios = []
    for epoch in range(3):
        order = EpochOrder(BlockOrder(len(values), block_rows, (1, epoch)), lanes, pool_rows, (1, epoch))
        found = np.empty(len(values))
        for lane in range(lanes):
            place, pool = 0, 0
            while place < order.lane_rows(lane):
                rows = order.rows_of(lane, pool)[order.permutation_of(lane, pool)]
                found[(place + np.arange(len(rows))) * lanes + lane] = values[rows]
                place, pool = place + len(rows), pool + 1
        means = found.reshape(-1, batch * world_size).mean(1)
        ratios.append(means.var() / (values.var() / (batch * world_size)))
    assert np.mean(ratios) < 1.25


@given(
    num_rows=st.integers(0, 200), block_rows=st.integers(1, 9), lanes=st.integers(1, 20), pool_rows=st.integers(1, 40),
    chosen=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_every_order_holds_each_row_once(num_rows, block_rows, lanes, pool_rows, chosen, shuffle, seed):
    rows = np.flatnonzero(np.random.default_rng(seed % 2**32).random(num_rows) < 0.5) if chosen else num_rows
    key = (seed, 3) if shuffle else None
    blocks = BlockOrder(rows, block_rows, key)
    order = EpochOrder(blocks, lanes, pool_rows, key)
    wanted = rows.tolist() if chosen else list(range(num_rows))
    laid = blocks.rows_between(0, blocks.num_rows)
    half = blocks.num_rows // 2
    assert [*blocks.rows_between(0, half), *blocks.rows_between(half, blocks.num_rows)] == laid.tolist()
    places = np.arange(blocks.num_rows)
    found = np.full(len(places), -1)
    for lane, pool, inside in sorted(set(zip(*(part.tolist() for part in order.locate(places)), strict=True))):
        at = place_of(order, lane, pool, inside)
        found[at] = order.rows_of(lane, pool)[order.permutation_of(lane, pool)][inside]
    assert sorted(found.tolist()) == wanted
    if not shuffle:
        assert laid.tolist() == wanted


def place_of(order, lane, pool, inside):
    return (order.pool_bounds(lane, pool)[0] + inside) * order.lanes + lane


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**32))
def test_a_permutation_is_one(size, seed, stream):
    permutation = Permutation(size, seed, stream)
    elements = permutation(np.arange(size))
    assert sorted(elements.tolist()) == list(range(size))
    np.testing.assert_array_equal(permutation.place_of(elements), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 5, 9, 16])
def test_each_element_comes_to_each_place_equally_often(size):
    draws = np.array([Permutation(size, seed, 0)(np.arange(size)) for seed in range(3000)])
    counts = np.array([np.bincount(draws[:, place], minlength=size) for place in range(size)])
    spread = np.sqrt(3000 / size)
    assert abs(counts - 3000 / size).max() < 5 * spread


@pytest.mark.parametrize("different", [3, 2**63])
def test_draws_are_sorted_as_a_stable_sort_does_it(different):
    """Also equal ones, which draws of 64 bits hardly ever are."""
    draws = np.random.default_rng(0).integers(0, different, 5000, dtype=np.uint64)
    assert ascending(draws).tolist() == np.argsort(draws, kind="stable").tolist()
