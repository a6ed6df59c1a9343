"""Batches: each row once an epoch, the same for a seed, cut alike for any world size, resumable anywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vqmill
from vqmill import CodesError
from vqmill import loader as loader_module

NUM_ROWS = 53


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


@pytest.fixture(params=[10, 10_000], ids=lambda rows: f"pool{rows}")
def pool_rows(request, monkeypatch, stores):
    """Several pools an epoch, and all rows in one."""
    monkeypatch.setattr(loader_module, "POOL_BYTES", request.param * stores.two_levels.row_bytes)
    return request.param


def labels_of(batches):
    return [batch["label"].tolist() for batch in batches]


def flat(batches):
    return [label for batch in labels_of(batches) for label in batch]


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_once_an_epoch_with_its_own_codes(codes_and_rows, pool_rows, shuffle):
    codes, rows = codes_and_rows
    batches = codes.batches(8, shuffle=shuffle)
    for _ in range(2):
        seen = []
        for batch in batches:
            assert list(batch) == ["label", "top", "bottom"]
            assert batch["label"].dtype == np.int64
            for name, values in rows.items():
                assert batch[name].dtype == codes[name].dtype
                np.testing.assert_array_equal(batch[name], values[batch["label"]])
            seen += batch["label"].tolist()
        assert sorted(seen) == list(range(NUM_ROWS))
        assert shuffle or seen == list(range(NUM_ROWS))


def test_orders_follow_seed_and_epoch(codes, pool_rows):
    first, again, other = (codes.batches(8, shuffle=True, seed=seed) for seed in (0, 0, 1))
    epochs = [flat(first) for _ in range(3)]
    assert [flat(again) for _ in range(3)] == epochs
    assert len({tuple(epoch) for epoch in [*epochs, list(range(NUM_ROWS)), flat(other)]}) == 5


def test_the_order_does_not_depend_on_the_batch_size(codes, pool_rows):
    assert len({tuple(flat(codes.batches(size, shuffle=True))) for size in (1, 3, 8, 53, 100)}) == 1


def test_a_shuffle_reaches_across_blocks(codes):
    """With all rows in one pool, a batch mixes rows of far Zarr shards."""
    first = labels_of(codes.batches(16, shuffle=True))[0]
    assert len({row // 8 for row in first}) > 3


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_partition_the_epoch(codes, pool_rows, world_size, last, shuffle):
    options = {"shuffle": shuffle, "seed": 3, "last": last}
    order = flat(codes.batches(7, shuffle=shuffle, seed=3))
    ranks = [codes.batches(5, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    batches = [labels_of(loader) for loader in ranks]
    assert [len(loader) for loader in ranks] == [len(given) for given in batches]
    # The ranks' parts of a global batch, put together, are the next rows of the one order.
    together = []
    for step in range(max(map(len, batches), default=0)):
        together += [label for given in batches if step < len(given) for label in given[step]]
    global_size = 5 * world_size
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
def test_resuming_anywhere_equals_going_on(codes, pool_rows, last):
    options = {"shuffle": True, "seed": 5, "last": last}
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
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_resuming_into_another_world_size(codes, pool_rows, world_size, last):
    """One rank gave three global batches of 12; any number of ranks takes up the rest of them."""
    options = {"shuffle": True, "seed": 5, "last": last}
    single = codes.batches(12, **options)
    iterator = iter(single)
    for _ in range(3):
        next(iterator)
    state = single.state_dict()
    expected = [label for batch in iterator for label in batch["label"].tolist()]
    ranks = []
    for rank in range(world_size):
        loader = codes.batches(12 // world_size, rank=rank, world_size=world_size, **options)
        loader.load_state_dict(state)
        ranks.append(labels_of(loader))
    steps = range(max(map(len, ranks)))
    assert [label for step in steps for given in ranks if step < len(given) for label in given[step]] == expected


def test_the_state_is_small_and_moves(codes):
    loader = codes.batches(6, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert state["global_batches"] == 1
    assert len(json.dumps(state)) < 500
    list(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["global_batches"]) == (1, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"batch_size": 5},
        {"world_size": 2},
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


@pytest.mark.parametrize("change", [{"epoch": -1}, {"global_batches": -1}, {"epoch": "a"}, {"epoch": None}, None])
def test_a_damaged_state_is_refused(codes, change):
    loader = codes.batches(6)
    with pytest.raises(CodesError):
        loader.load_state_dict({} if change is None else loader.state_dict() | change)


def test_a_subset_of_rows(codes, pool_rows):
    rows = np.array([40, 3, 17, 18, 52, 0, 30])
    assert flat(codes.batches(3, rows=rows)) == sorted(rows.tolist())
    shuffled = codes.batches(3, rows=rows, shuffle=True)
    assert sorted(flat(shuffled)) == sorted(rows.tolist())
    assert len(shuffled) == 3
    assert list(codes.batches(3, rows=np.array([], np.int64), shuffle=True, last="pad")) == []


def test_a_subset_of_levels(codes):
    batch = next(iter(codes.batches(3, levels=["bottom"])))
    assert sorted(batch) == ["bottom", "label"]
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
        {"seed": -1, "shuffle": True},
        {"seed": 2**64, "shuffle": True},
    ],
    ids=lambda options: "-".join(f"{name}={np.asarray(value).ravel()[:2].tolist()}" for name, value in options.items()),
)
def test_options_out_of_range_are_refused_at_once(codes, options):
    with pytest.raises(CodesError):
        codes.batches(**{"batch_size": 4} | options)


def test_a_code_out_of_range_stops_the_epoch(store, stores):
    """K in the metadata is lowered below what the arrays hold."""

    def lower(group):
        group["attributes"]["vqmill"]["levels"][0]["codebook_size"] = 300

    stores.edit_json(store / "zarr.json", lower)
    with pytest.raises(CodesError, match=r"'top' holds code \d+ .*rows? \d+.*codebook_size is 300"):
        list(vqmill.open_codes(store).batches(4))


def test_memory_is_bounded_by_the_pool(codes, pool_rows, monkeypatch):
    read = []
    original = loader_module.CodeBatches._read
    monkeypatch.setattr(
        loader_module.CodeBatches, "_read", lambda self, rows: read.append(len(rows)) or original(self, rows)
    )
    list(codes.batches(4, shuffle=True))
    assert max(read) <= max(4, pool_rows)
    assert sum(read) == NUM_ROWS
