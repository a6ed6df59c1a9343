"""Several stores in one stream: shares, epochs of each, ranks, resuming."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import vqmill
from vqmill import CodesError, MixedBatches
from vqmill.spec import LevelSpec

SIZES = (21, 53, 8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, stores):
    """Three stores; a row's label is its number plus a thousand times its store."""
    opened = []
    for number, size in enumerate(SIZES):
        rows = stores.codes(stores.two_levels, size, seed=number)
        path = tmp_path_factory.mktemp("mix") / "codes.zarr"
        stores.write(path, stores.two_levels, rows, [1000 * number + row for row in range(size)])
        opened.append((vqmill.open_codes(path), rows))
    return opened


@pytest.fixture
def stores_and_weights(mixed):
    return [(codes, weight) for (codes, _), weight in zip(mixed, (1, 2.5, 0.7), strict=True)]


def labels(batches, count):
    return [batch["label"].tolist() for batch in islice(batches, count)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_are_those_of_their_stores_in_their_shares(mixed, stores_and_weights, shuffle):
    given = Counter()
    for number, batch in enumerate(islice(MixedBatches(stores_and_weights, 7, shuffle=shuffle), 60), start=1):
        assert sorted(batch) == ["bottom", "label", "row", "store", "top"]
        assert {name: len(values) for name, values in batch.items()} == dict.fromkeys(batch, 7)
        np.testing.assert_array_equal(batch["label"], 1000 * batch["store"] + batch["row"])
        for name in ("top", "bottom"):
            expected = [mixed[store][1][name][row] for store, row in zip(batch["store"], batch["row"], strict=True)]
            np.testing.assert_array_equal(batch[name], expected)
        given.update(batch["store"].tolist())
        for store, (_, weight) in enumerate(stores_and_weights):
            assert abs(given[store] - 7 * number * weight / 4.2) < len(SIZES)


def test_each_store_goes_through_epochs_of_its_own(stores_and_weights):
    rows = [
        label for batch in labels(MixedBatches(stores_and_weights, 10, shuffle=True, seed=1), 100) for label in batch
    ]
    for store, size in enumerate(SIZES):
        mine = [label % 1000 for label in rows if label // 1000 == store]
        epochs = [mine[first : first + size] for first in range(0, len(mine) - size, size)]
        assert len(epochs) >= 8
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_rows_of_a_small_share_are_spread_over_a_batch(mixed):
    batch = next(iter(MixedBatches([(mixed[0][0], 3), (mixed[1][0], 1)], 16)))
    places = np.flatnonzero(batch["store"] == 1)
    assert len(places) == 4
    assert np.diff(places).min() >= 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_store_without_overlap(stores_and_weights, world_size):
    ranks = [MixedBatches(stores_and_weights, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    given = [labels(loader, 8) for loader in ranks]
    stores = [[[label // 1000 for label in batch] for batch in batches] for batches in given]
    assert stores[1:] == stores[:-1]  # the same shares at every step on every rank
    first_epoch = [label for batches in given for batch in batches[:2] for label in batch]
    assert len(set(first_epoch)) == len(first_epoch)


def test_resuming_equals_going_on(stores_and_weights):
    loader = MixedBatches(stores_and_weights, 5, seed=3)
    iterator = iter(loader)
    states = [json.dumps(loader.state_dict())]
    batches = []
    for _ in range(30):
        batches.append(next(iterator)["label"].tolist())
        states.append(json.dumps(loader.state_dict()))
    for done in range(0, 30, 4):
        resumed = MixedBatches(stores_and_weights, 5, seed=3)
        resumed.load_state_dict(json.loads(states[done]))
        assert labels(resumed, 30 - done) == batches[done:]


def test_resuming_with_more_ranks_gives_each_row_once(mixed):
    pair = [(mixed[0][0], 1), (mixed[1][0], 1)]
    loader = MixedBatches(pair, 4, seed=3)
    before = labels(loader, 3)
    ranks = [MixedBatches(pair, 2, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    after = [labels(rank, 6) for rank in ranks]
    rows = [label for batches in [before, *after] for batch in batches for label in batch]
    first = [label for label in rows if label < 1000]
    assert len(rows) == 36
    assert len(first) == len(set(first)) == 18


@pytest.mark.parametrize("weights", [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1)])
def test_weights_must_be_above_zero(mixed, weights):
    with pytest.raises(CodesError, match="above 0"):
        MixedBatches([(codes, weight) for (codes, _), weight in zip(mixed, weights, strict=False)], 4)
    with pytest.raises(CodesError, match="above 0"):
        MixedBatches([], 4)


@pytest.mark.parametrize(
    "wrong",
    [lambda codes: [codes, codes], lambda codes: "c.zarr", lambda codes: [("c.zarr", 1)]],
    ids=["no weights", "a path", "paths"],
)
def test_what_is_no_list_of_pairs_is_refused(mixed, wrong):
    with pytest.raises(CodesError, match="pairs"):
        MixedBatches(wrong(mixed[0][0]), 4)


def test_a_state_of_other_weights_or_rows_is_refused(mixed, stores_and_weights):
    state = MixedBatches(stores_and_weights, 4).state_dict()
    others = [
        MixedBatches([(codes, 1) for codes, _ in stores_and_weights], 4),
        MixedBatches(stores_and_weights, 4, seed=1),
        MixedBatches(stores_and_weights, 4, rows=[None, np.arange(5), None]),
    ]
    for other in others:
        with pytest.raises(CodesError, match="state was taken with"):
            other.load_state_dict(state)
    for damaged in ({}, state | {"stores": 5}, state | {"stores": []}, state | {"stores": [1, 2, 3]}):
        with pytest.raises(CodesError):
            MixedBatches(stores_and_weights, 4).load_state_dict(damaged)


@pytest.mark.parametrize(
    ("change", "differs"),
    [({"tokenizer": {"fingerprint": "1" * 32}}, "fingerprint"), ({"levels": (LevelSpec("top", 512, (2, 2)), LevelSpec("bottom", 200, (4, 6)))}, "grid"),
     ({"levels": (LevelSpec("top", 100, (2, 3)), LevelSpec("bottom", 200, (4, 6)))}, "codebook_size")],
    ids=["fingerprint", "grid", "codebook"],
)  # fmt: skip
def test_stores_of_other_tokenizers_are_refused(tmp_path, stores, mixed, change, differs):
    spec = replace(stores.two_levels, **change)
    other = vqmill.open_codes(stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 9)))
    with pytest.raises(CodesError, match=differs):
        MixedBatches([(mixed[0][0], 1), (other, 1)], 4)


def test_selections_of_rows(mixed):
    pair = [(mixed[0][0], 1), (mixed[1][0], 1)]
    rows = [label for batch in labels(MixedBatches(pair, 4, rows=[np.array([3, 5]), None]), 10) for label in batch]
    assert {label for label in rows if label < 1000} == {3, 5}
    with pytest.raises(CodesError, match="one for each"):
        MixedBatches(pair, 4, rows=[None])
    with pytest.raises(CodesError, match="no rows to mix in"):
        MixedBatches(pair, 4, rows=[np.array([], np.int64), None])


def test_options_have_effects(mixed):
    pair = [(mixed[0][0], 1), (mixed[1][0], 1)]
    batch = next(iter(MixedBatches(pair, 4, levels=["top"])))
    assert "bottom" not in batch
    shapes = [store["lanes"] for store in MixedBatches(pair, 4, shuffle=True, pool_bytes=2000).state_dict()["stores"]]
    assert shapes != [store["lanes"] for store in MixedBatches(pair, 4, shuffle=True).state_dict()["stores"]]
    before = threading.active_count()
    running = iter(MixedBatches(pair, 4, threads=3))
    next(running)
    assert before < threading.active_count() <= before + 3
    with pytest.raises(CodesError, match="pool_bytes"):
        MixedBatches(pair, 4, pool_bytes=100)
    with pytest.raises(CodesError, match="threads"):
        MixedBatches(pair, 4, threads=0)
    first, second = (MixedBatches(pair, 4, shuffle=True, seed=seed) for seed in (0, 1))
    assert labels(first, 3) != labels(second, 3)


def test_two_tokenizations_of_one_corpus_do_not_come_in_step(mixed):
    pair = [(mixed[1][0], 1), (mixed[1][0], 1)]
    batch = next(iter(MixedBatches(pair, 40, shuffle=True)))
    assert batch["row"][batch["store"] == 0].tolist() != batch["row"][batch["store"] == 1].tolist()
