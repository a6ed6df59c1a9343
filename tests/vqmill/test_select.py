"""Rows chosen by label and by what the samples table says."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest

import vqmill
from vqmill import CodesError


@pytest.fixture(scope="module")
def codes(finished_store):
    """21 rows; labels are row numbers, every fifth is missing; width is 28 + its place in the Zarr shard of 8."""
    return vqmill.open_codes(finished_store)


def test_without_filters_all_rows_are_meant(codes):
    assert codes.select().tolist() == list(range(21))


@pytest.mark.parametrize(
    ("labels", "rows"), [([3], [3]), ([20, 0, 7], [0, 7, 20]), ([-1], [4, 9, 14, 19]), ([99], []), ([], [])]
)
def test_by_label(codes, labels, rows):
    found = codes.select(labels=labels)
    assert found.dtype == np.int64
    assert found.tolist() == rows


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (pc.field("width") >= 34, [6, 7, 14, 15]),
        (pc.field("key") == "class/sample-17", [17]),
        (pc.field("label").is_null(), [4, 9, 14, 19]),
        (pc.field("caption").is_valid() & (pc.field("index") > 16), [17, 19]),
        (pc.field("width") > 1000, []),
    ],
    ids=str,
)
def test_by_expression(codes, where, rows):
    assert codes.select(where=where).tolist() == rows


def test_both_filters_must_hold(codes):
    assert codes.select(labels=[6, 7, 8], where=pc.field("width") >= 34).tolist() == [6, 7]


def test_selected_rows_are_what_batches_give(codes):
    rows = codes.select(where=pc.field("width") < 30)
    batches = codes.batches(3, rows=rows, shuffle=True)
    assert sorted(row for batch in batches for row in batch["row"].tolist()) == rows.tolist() == [0, 1, 8, 9, 16, 17]


@pytest.mark.parametrize("where", [pc.field("colour") == 1, pc.field("key") > 5, pc.field("width")], ids=str)
def test_an_expression_that_does_not_fit_is_refused(codes, where):
    with pytest.raises(CodesError, match="its columns are key, source"):
        codes.select(where=where)


@pytest.mark.parametrize("labels", [["cat"], "3", [1.5], [True]])
def test_labels_are_numbers(codes, labels):
    with pytest.raises(CodesError, match="label must be"):
        codes.select(labels=labels)


def test_lines_of_any_rows(codes):
    rows = np.array([20, 3, 3, 8])
    assert codes.samples_at(rows)["key"].to_pylist() == [f"class/sample-{row}" for row in rows]
    assert codes.samples_at(np.array([], np.int64)).num_rows == 0
    for bad in ([21], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.20"):
            codes.samples_at(np.array(bad))


def test_an_empty_store(tmp_path, stores):
    spec = stores.two_levels
    empty = stores.write(
        tmp_path / "codes.zarr", spec, {level.name: np.zeros((0, *level.grid), np.int64) for level in spec.levels}
    )
    assert vqmill.open_codes(empty).select(labels=[1], where=pc.field("width") > 3).tolist() == []
