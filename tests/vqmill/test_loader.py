"""Batches: each row once an epoch, the same for a seed, cut alike for any world size, resumable anywhere."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import vqmill
from vqmill import CodesError
from vqmill.pools import PoolMemory

pytestmark = pytest.mark.usefixtures("both_ways")

NUM_ROWS = 53
FIRST_ROWS = [32, 34, 36, 38, 8, 10, 12, 14, 48, 50, 52, 25, 27, 29, 31, 17]


@pytest.fixture
def codes(numbered):
    return numbered[0]


def labels_of(batches):
    return [batch["label"].tolist() for batch in batches]


def flat(batches):
    return [label for batch in labels_of(batches) for label in batch]


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_once_an_epoch_with_its_own_codes(numbered, pool, shuffle):
    codes, rows = numbered
    batches = codes.batches(8, shuffle=shuffle, **pool)
    for _ in range(2):
        seen = []
        for batch in batches:
            assert sorted(batch) == ["bottom", "label", "row", "top"]
            assert batch["label"].dtype == batch["row"].dtype == np.int64
            np.testing.assert_array_equal(batch["label"], batch["row"])
            for name, values in rows.items():
                assert batch[name].dtype == codes[name].dtype
                np.testing.assert_array_equal(batch[name], values[batch["label"]])
            seen += batch["label"].tolist()
        assert sorted(seen) == list(range(NUM_ROWS))
        assert shuffle or seen == list(range(NUM_ROWS))


def test_orders_follow_seed_and_epoch(codes, pool):
    first, again, other = (codes.batches(8, shuffle=True, seed=seed, **pool) for seed in (0, 0, 1))
    epochs = [flat(first) for _ in range(3)]
    assert [flat(again) for _ in range(3)] == epochs
    assert len({tuple(epoch) for epoch in [*epochs, list(range(NUM_ROWS)), flat(other)]}) == 5


def test_the_order_does_not_depend_on_the_batch_size(codes, pool):
    assert len({tuple(flat(codes.batches(size, shuffle=True, **pool))) for size in (1, 3, 8, 53, 100)}) == 1


def test_the_order_does_not_depend_on_the_number_of_threads(codes, pool):
    orders = [flat(codes.batches(8, shuffle=True, threads=threads, **pool)) for threads in (1, 2, 7, None)]
    assert orders[1:] == orders[:-1]


def test_the_order_is_the_same_in_every_release(codes, memory_for):
    """Draws are Philox's raw ones: a change of this list breaks the states that people have saved."""
    memory = {"pool_bytes": memory_for(30)}
    assert flat(codes.batches(16, shuffle=True, seed=7, **memory))[:16] == FIRST_ROWS


def test_a_shuffle_reaches_across_blocks(codes):
    """With all rows in one pool, a batch mixes rows of far Zarr shards."""
    first = labels_of(codes.batches(16, shuffle=True))[0]
    assert len({row // 8 for row in first}) > 3


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
def test_resuming_anywhere_equals_going_on(codes, pool, last):
    options = {"shuffle": True, "seed": 5, "last": last, **pool}
    loader = codes.batches(6, **options)
    states, batches = [json.dumps(loader.state_dict())], []
    for _ in range(2):
        for batch in loader:
            states.append(json.dumps(loader.state_dict()))
            batches.append(batch["label"].tolist())
    for done, state in list(enumerate(states))[::3]:
        resumed = codes.batches(6, **options)
        resumed.load_state_dict(json.loads(state))
        rest = []
        while len(rest) < len(batches) - done:
            rest += labels_of(resumed)
        assert rest[: len(batches) - done] == batches[done:]


def test_the_state_is_small_and_moves(codes):
    loader = codes.batches(6, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert state["place"] == 6
    assert len(json.dumps(state)) < 500
    list(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["place"]) == (1, 0)


def test_an_epoch_that_was_left_goes_on(codes):
    loader = codes.batches(6, shuffle=True)
    first = next(iter(loader))["label"].tolist()
    assert sorted(first + flat(loader)) == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"shuffle": False},
        {"rows": np.arange(20)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_state_of_another_order_is_refused(codes, other):
    options = {"batch_size": 6, "shuffle": True, "seed": 0}
    state = codes.batches(**options).state_dict()
    with pytest.raises(CodesError):
        codes.batches(**options | other).load_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"epoch": -1}, {"place": -1}, {"epoch": "a"}, {"epoch": None}, {"lanes": 0}, {"pool_rows": True}, None]
)
def test_a_damaged_state_is_refused(codes, change):
    loader = codes.batches(6)
    with pytest.raises(CodesError):
        loader.load_state_dict({} if change is None else loader.state_dict() | change)


def test_a_subset_of_rows(codes, pool):
    rows = np.array([40, 3, 17, 18, 52, 0, 30])
    assert flat(codes.batches(3, rows=rows, **pool)) == sorted(rows.tolist())
    shuffled = codes.batches(3, rows=rows, shuffle=True, **pool)
    assert sorted(flat(shuffled)) == sorted(rows.tolist())
    assert len(shuffled) == 3
    assert list(codes.batches(3, rows=np.array([], np.int64), shuffle=True, last="pad")) == []


def test_a_subset_of_levels(codes):
    batch = next(iter(codes.batches(3, levels=["bottom"])))
    assert sorted(batch) == ["bottom", "label", "row"]
    with pytest.raises(CodesError, match="no level 'middle'"):
        codes.batches(3, levels=["middle"])


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"rank": 4, "world_size": 4},
        {"last": "other"},
        {"rows": np.array([53])},
        {"rows": np.array([-1])},
        {"rows": np.array([1, 1])},
        {"rows": np.array([1.5])},
        {"rows": np.array([[1, 2]])},
        {"rows": np.ones(NUM_ROWS, bool)},
        {"threads": 0},
        {"pool_bytes": 100},
        {"seed": -1, "shuffle": True},
        {"seed": 2**64, "shuffle": True},
    ],
    ids=lambda options: "-".join(f"{name}={np.asarray(value).ravel()[:2].tolist()}" for name, value in options.items()),
)
def test_options_out_of_range_are_refused_at_once(codes, options):
    with pytest.raises(CodesError):
        codes.batches(**{"batch_size": 4} | options)


def test_only_the_latest_iterator_goes_on(codes, pool):
    """Two at once would take each other's rows out of the epoch."""
    loader = codes.batches(4, shuffle=True, **pool)
    first = iter(loader)
    given = next(first)["row"].tolist()
    second = iter(loader)
    given += next(second)["row"].tolist()
    with pytest.raises(CodesError, match="outdated"):
        next(first)
    given += [row for batch in second for row in batch["row"].tolist()]
    assert sorted(given) == list(range(NUM_ROWS))
    third = iter(loader)
    next(third)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(CodesError, match="outdated"):
        next(third)


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
def test_taking_exactly_an_epoch_s_batches_again_and_again(codes, last):
    """As `islice(loader, len(loader))` does: no epoch is empty, none is given twice."""
    loader = codes.batches(4, shuffle=True, last=last)
    epochs = [[batch["row"].tolist() for batch in islice(loader, len(loader))] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 3
    assert (loader.state_dict()["epoch"], loader.state_dict()["place"]) == (3, 0)
    fresh = codes.batches(4, shuffle=True, last=last)
    assert epochs == [[batch["row"].tolist() for batch in fresh] for _ in range(3)]


def test_numbers_of_numpy_are_numbers(codes):
    loader = codes.batches(
        np.int64(5),
        seed=np.uint32(3),
        rank=np.int8(1),
        world_size=np.int64(2),
        shuffle=np.bool_(True),
        threads=np.int64(1),
    )
    expected = codes.batches(5, seed=3, rank=1, world_size=2, shuffle=True)
    assert json.loads(json.dumps(loader.state_dict())) == expected.state_dict()
    assert flat(loader) == flat(expected)


def test_a_state_of_a_store_that_has_grown(tmp_path, stores, codes, pool):
    """With the rows that it had, the loader goes on in the same order."""
    fewer = stores.write(
        tmp_path / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 21), list(range(21))
    )
    before = vqmill.open_codes(fewer).batches(4, shuffle=True, **pool)
    first = next(iter(before))["row"].tolist()
    with pytest.raises(CodesError, match="rows=range"):
        codes.batches(4, shuffle=True, **pool).load_state_dict(before.state_dict())
    after = codes.batches(4, shuffle=True, rows=range(21), **pool)
    after.load_state_dict(before.state_dict())
    assert flat(after) == flat(before)
    assert first


def test_a_state_of_another_store_is_refused(tmp_path, codes, stores):
    """The same rows in chunks of another size have another order."""
    spec = replace(stores.two_levels, rows_per_shard=16)
    other = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, NUM_ROWS))
    with pytest.raises(CodesError, match="block_rows"):
        vqmill.open_codes(other).batches(4).load_state_dict(codes.batches(4).state_dict())


def test_a_code_out_of_range_stops_the_epoch(store, stores):
    """K in the metadata is lowered below what the arrays hold."""

    def lower(group):
        group["attributes"]["vqmill"]["levels"][0]["codebook_size"] = 300

    stores.edit_json(store / "zarr.json", lower)
    with pytest.raises(CodesError, match=r"'top' holds code \d+ .*rows? \d+.*codebook_size is 300"):
        list(vqmill.open_codes(store).batches(4))


def test_memory_is_bounded_by_the_pool(codes, pool, monkeypatch):
    taken = []
    original = PoolMemory.allocate.__func__

    def allocate(cls, *arguments):
        memory = original(cls, *arguments)
        taken.append(memory.order.nbytes + sum(values.nbytes for values in memory.values.values()))
        return memory

    monkeypatch.setattr(PoolMemory, "allocate", classmethod(allocate))
    list(codes.batches(4, shuffle=True, **pool))
    whole = (NUM_ROWS + 16) * (codes.spec.row_bytes + 24)
    assert max(taken) <= 3 * whole if pool["pool_bytes"] > whole else max(taken) <= pool["pool_bytes"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_threads_end_with_the_epoch(codes, shuffle):
    before = threading.active_count()
    iterator = iter(codes.batches(4, shuffle=shuffle, threads=3))
    next(iterator)
    del iterator
    list(codes.batches(4, shuffle=shuffle, threads=3))
    assert threading.active_count() == before
