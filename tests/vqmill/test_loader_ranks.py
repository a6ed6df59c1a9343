"""Ranks: one epoch, cut alike for any world size, and taken up by another number of ranks where some others left it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import vqmill
from vqmill import CodesError
from vqmill.reader import RowReader

pytestmark = pytest.mark.usefixtures("both_ways")

NUM_ROWS = 53


@pytest.fixture
def codes(numbered):
    return numbered[0]


def labels_of(batches):
    return [batch["label"].tolist() for batch in batches]


def flat(batches):
    return [label for batch in labels_of(batches) for label in batch]


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


def test_ranks_read_different_lanes(codes, memory_for, monkeypatch):
    """Each of four ranks decodes about a quarter of the rows, not all of them."""
    read = []
    original = RowReader.read
    monkeypatch.setattr(RowReader, "read", lambda self, rows, out: read.append(len(rows)) or original(self, rows, out))
    memory = memory_for(30)
    for shuffle in (False, True):
        for rank in range(4):
            read.clear()
            list(codes.batches(2, shuffle=shuffle, rank=rank, world_size=4, pool_bytes=memory // 4))
            assert NUM_ROWS // 4 <= sum(read) / 3 <= NUM_ROWS // 4 + 1  # top, bottom, label


def test_a_rank_without_a_part_in_the_last_batch_has_no_empty_epoch(codes):
    ranks = [codes.batches(4, rank=rank, world_size=4, rows=np.arange(18)) for rank in range(4)]
    for loader in ranks:
        lengths = [sum(1 for _ in islice(loader, len(loader))) for _ in range(3)]
        assert lengths == [len(loader)] * 3


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


def test_an_epoch_begun_by_many_ranks_asks_for_the_memory_that_it_takes(codes, memory_for):
    state = codes.batches(1, shuffle=True, world_size=16, pool_bytes=memory_for(3)).state_dict()
    little = codes.batches(4, shuffle=True, pool_bytes=memory_for(4))
    with pytest.raises(CodesError, match=r"Give pool_bytes=[\d]+") as error:
        little.load_state_dict(state | {"place": 5})
    needed = int(str(error.value).split("Give pool_bytes=")[1].split(",")[0])
    enough = codes.batches(4, shuffle=True, pool_bytes=needed)
    enough.load_state_dict(state | {"place": 5})
    assert len(set(flat(enough))) == NUM_ROWS - 5
    own = codes.batches(4, shuffle=True, pool_bytes=needed)
    list(own)
    assert flat(enough) == flat(own)  # the next epoch is of its own kind
