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
from vqmill.reader import RowReader

pytestmark = pytest.mark.usefixtures("both_ways")

NUM_ROWS = 53
FIRST_ROWS = [32, 34, 36, 38, 8, 10, 12, 14, 48, 50, 52, 25, 27, 29, 31, 17]


@pytest.fixture(scope="module")
def codes_and_rows(tmp_path_factory, stores):
    """A store whose labels are its row numbers, and its codes in memory."""
    rows = stores.codes(stores.two_levels, NUM_ROWS)
    path = tmp_path_factory.mktemp("loader") / "codes.zarr"
    stores.write(path, stores.two_levels, rows, list(range(NUM_ROWS)))
    return vqmill.open_codes(path), rows


@pytest.fixture
def codes(codes_and_rows):
    return codes_and_rows[0]


def memory_for(stores, rows):
    """`pool_bytes` for so many rows, a quarter of it being kept for what is in hand."""
    return -(-rows * (stores.two_levels.row_bytes + 64) * 4 // 3) + 3


@pytest.fixture(params=[3, 10, 30, 10_000], ids=lambda rows: f"pool{rows}")
def pool(request, stores):
    """Memory for the fewest rows that will do, for some pools an epoch, and for all rows in one."""
    return {"pool_bytes": memory_for(stores, request.param)}


def labels_of(batches):
    return [batch["label"].tolist() for batch in batches]


def flat(batches):
    return [label for batch in labels_of(batches) for label in batch]


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_once_an_epoch_with_its_own_codes(codes_and_rows, pool, shuffle):
    codes, rows = codes_and_rows
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


def test_the_order_is_the_same_in_every_release(codes, stores):
    """Draws are Philox's raw ones: a change of this list breaks the states that people have saved."""
    memory = {"pool_bytes": memory_for(stores, 30)}
    assert flat(codes.batches(16, shuffle=True, seed=7, **memory))[:16] == FIRST_ROWS


def test_a_shuffle_reaches_across_blocks(codes):
    """With all rows in one pool, a batch mixes rows of far Zarr shards."""
    first = labels_of(codes.batches(16, shuffle=True))[0]
    assert len({row // 8 for row in first}) > 3


def dealt(batches):
    """One row of each rank in turn, batch by batch: the order of all ranks together."""
    together = []
    for step in range(max(map(len, batches), default=0)):
        rows = [given[step] if step < len(given) else [] for given in batches]
        together += [part[i] for i in range(max(map(len, rows))) for part in rows if i < len(part)]
    return together


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_partition_the_epoch(codes, pool, world_size, last, shuffle):
    options = {"shuffle": shuffle, "seed": 3, "last": last, **pool}
    ranks = [codes.batches(5, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    batches = [labels_of(loader) for loader in ranks]
    assert [len(loader) for loader in ranks] == [len(given) for given in batches]
    together, global_size = dealt(batches), 5 * world_size
    alone = codes.batches(7, shuffle=shuffle, seed=3)
    alone.load_state_dict(ranks[0].state_dict() | {"epoch": 0})  # in the lanes and pools of these ranks
    order = flat(alone)
    assert sorted(order) == list(range(NUM_ROWS))
    if last == "keep":
        assert together == order
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
    else:
        assert {len(batch) for given in batches for batch in given} == {5}
        assert len(set(map(len, batches))) == 1
        whole = NUM_ROWS // global_size * global_size
        padding = order[: global_size - NUM_ROWS % global_size]
        assert together == (order[:whole] if last == "drop" else order + padding)


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
def test_fewer_rows_than_ranks(codes, last):
    options = {"world_size": 4, "last": last, "rows": np.array([7, 9]), "shuffle": True}
    ranks = [codes.batches(3, rank=rank, **options) for rank in range(4)]
    given = [labels_of(loader) for loader in ranks]
    assert [len(loader) for loader in ranks] == [len(batches) for batches in given]
    everything = [label for batches in given for batch in batches for label in batch]
    assert len(everything) == {"keep": 2, "drop": 0, "pad": 12}[last]
    assert set(everything) == (set() if last == "drop" else {7, 9})


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


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@pytest.mark.parametrize(("first", "then"), [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (16, 5), (12, 33), (1, 33)])
def test_resuming_into_another_world_size_and_batch_size(codes, pool, first, then, last):
    """What one set of ranks gave and what another set takes up are together the epoch that one rank alone goes through."""
    options = {"shuffle": True, "seed": 5, "last": last, **pool}
    before = [codes.batches(1, rank=rank, world_size=first, **options) for rank in range(first)]
    iterators = [iter(loader) for loader in before]
    given = [[next(iterator)["label"].tolist()] for iterator in iterators]
    states = [loader.state_dict() for loader in before]
    assert states[1:] == states[:-1]
    after = [
        codes.batches(3, rank=rank, world_size=then, **options | {"pool_bytes": 1_000_000}) for rank in range(then)
    ]
    for loader in after:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    together = dealt(given) + dealt([labels_of(loader) for loader in after])
    alone = codes.batches(7, shuffle=True, seed=5)
    alone.load_state_dict(states[0] | {"place": 0})
    order = flat(alone)
    left = NUM_ROWS - first
    end = {"keep": NUM_ROWS, "drop": NUM_ROWS - left % (3 * then), "pad": NUM_ROWS}[last]
    assert together[:NUM_ROWS] == order[:end]
    assert len(together) == end + (-left % (3 * then) if last == "pad" else 0)


def test_ranks_read_different_lanes(codes, stores, monkeypatch):
    """Each of four ranks decodes about a quarter of the rows, not all of them."""
    read = []
    original = RowReader.read
    monkeypatch.setattr(RowReader, "read", lambda self, rows, out: read.append(len(rows)) or original(self, rows, out))
    memory = memory_for(stores, 30)
    for shuffle in (False, True):
        for rank in range(4):
            read.clear()
            list(codes.batches(2, shuffle=shuffle, rank=rank, world_size=4, pool_bytes=memory // 4))
            assert NUM_ROWS // 4 <= sum(read) / 3 <= NUM_ROWS // 4 + 1  # top, bottom, label


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


def test_a_rank_without_a_part_in_the_last_batch_has_no_empty_epoch(codes):
    ranks = [codes.batches(4, rank=rank, world_size=4, rows=np.arange(18)) for rank in range(4)]
    for loader in ranks:
        lengths = [sum(1 for _ in islice(loader, len(loader))) for _ in range(3)]
        assert lengths == [len(loader)] * 3


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


def test_an_epoch_begun_by_many_ranks_asks_for_the_memory_that_it_takes(codes, stores):
    state = codes.batches(1, shuffle=True, world_size=16, pool_bytes=memory_for(stores, 3)).state_dict()
    little = codes.batches(4, shuffle=True, pool_bytes=memory_for(stores, 4))
    with pytest.raises(CodesError, match=r"Give pool_bytes=[\d]+") as error:
        little.load_state_dict(state | {"place": 5})
    needed = int(str(error.value).split("Give pool_bytes=")[1].split(",")[0])
    enough = codes.batches(4, shuffle=True, pool_bytes=needed)
    enough.load_state_dict(state | {"place": 5})
    assert len(set(flat(enough))) == NUM_ROWS - 5
    own = codes.batches(4, shuffle=True, pool_bytes=needed)
    list(own)
    assert flat(enough) == flat(own)  # the next epoch is of its own kind


def test_the_order_is_the_same_on_any_number_of_ranks_that_divides_the_lanes(tmp_path_factory, stores):
    """With the default pool, of a store that is larger than it, and one global batch."""
    spec = replace(stores.two_levels, rows_per_shard=4)
    rows = 4 * 5 * 8 * 3
    path = stores.write(
        tmp_path_factory.mktemp("ranks") / "codes.zarr", spec, stores.codes(spec, rows), list(range(rows))
    )
    codes = vqmill.open_codes(path)
    orders = set()
    for world_size in (1, 2, 4, 8):
        ranks = [
            codes.batches(8 // world_size, shuffle=True, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        orders.add(tuple(dealt([labels_of(loader) for loader in ranks])))
    assert len(orders) == 1
    assert sorted(orders.pop()) == list(range(rows))


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
