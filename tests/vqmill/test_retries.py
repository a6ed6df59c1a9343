"""Stores in which quarantined samples were tried again: what counts, and what `verify` says of those that do not add up."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

import vqmill
from vqmill.commits import Counts
from vqmill.errors import CodesError
from vqmill.layout import group_metadata, read_spec
from vqmill.spec import Segment, StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA
from vqmill.verify import verify_store

BASE, RETRY = Segment("a", 0, 0, 2, 22), Segment("b", 20, 2, 4, 24, 2)


def row(number):
    """The quarantine line of the sample that has row `number` in the stores of conftest.py."""
    return {"key": f"class/sample-{number}", "source": "shard-é.tar", "input_shard": 0, "index": number}


BAD = row(99)
GOOD = (BAD, row(20), BAD)  # of each Zarr shard: a sample that stays bad, and one that is row 20 now


@pytest.fixture
def retried(tmp_path, stores, no_fsync):
    """Makes a store of 21 rows in three Zarr shards, each with one quarantine line."""

    def make(lines=GOOD, segments=(BASE, RETRY)):
        class Lines(type(stores)):
            @staticmethod
            def quarantine(shard):
                line = lines[shard] | {"reason": "truncated", "detail": f"in part {shard}"}
                return pa.Table.from_pylist([line], schema=QUARANTINE_SCHEMA)

        spec = replace(stores.two_levels, segments=segments)
        return Lines().write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21))

    return make


def test_only_the_newest_line_of_a_sample_counts(retried):
    path = retried()
    codes = vqmill.open_codes(path)
    assert codes.quarantine()["detail"].to_pylist() == ["in part 2"]
    assert codes.quarantine(history=True)["detail"].to_pylist() == ["in part 0", "in part 1", "in part 2"]
    found = verify_store(path)
    assert (found.problems, found.counts) == ((), Counts(encoded=21, quarantined=1))


def test_a_retry_under_way_leaves_the_finished_part_as_it_was(retried):
    path = retried()
    spec = read_spec(path)
    (path / "zarr.json").write_bytes(group_metadata(replace(spec, complete=False)))
    finished, all_of_it = vqmill.open_codes(path), vqmill.open_codes(path, allow_incomplete=True)
    assert (len(finished), len(all_of_it)) == (20, 21)
    assert finished.quarantine()["detail"].to_pylist() == ["in part 0", "in part 1"]
    assert all_of_it.quarantine().num_rows == 3
    behind = Segment("c", 21, 2, 5, 24)
    (path / "zarr.json").write_bytes(group_metadata(replace(spec, segments=(BASE, RETRY, behind), complete=False)))
    assert vqmill.open_codes(path).quarantine()["detail"].to_pylist() == ["in part 2"]


@pytest.mark.parametrize(
    ("lines", "segments", "wrong"),
    [
        ((BAD, row(20), row(5)), (BASE, RETRY), ["1 samples are in it more than once", "1 samples that were to be tried"]),
        ((BAD, row(98), BAD), (BASE, RETRY), ["1 samples that were to be tried again have neither"]),
        (GOOD, (replace(BASE, num_samples=20), replace(RETRY, retries=4)), ["4 quarantined samples again, but only 3"]),
        (GOOD, (BASE, replace(RETRY, retries=3)), ["segment 1 (row 20, commit 2) does not follow"]),
        (GOOD, (Segment("b", 0, 0, 4, 24, 2),), ["segment 0 (row 0, commit 0) does not follow"]),
        (GOOD, (BASE, replace(RETRY, num_samples=25, retries=3)), ["the plan has 25 samples, the commit records count 24"]),
    ],
    ids=["twice", "lost", "more than lines", "more than the plan", "first", "more than seen"],
)  # fmt: skip
def test_retries_that_do_not_add_up_are_found(retried, lines, segments, wrong):
    problems = verify_store(retried(lines, segments)).problems
    assert [(problem.kind, problem.file) for problem in problems] == [("counts", "zarr.json")] * len(wrong)
    for problem, text in zip(problems, wrong, strict=True):
        assert text in str(problem)


def test_samples_are_counted_once_at_every_moment(stores):
    spec = replace(stores.two_levels, segments=(BASE, RETRY, Segment("c", 21, 2, 5, 40), Segment("d", 37, 4, 6, 41, 1)))
    assert [spec.retried(seen) for seen in (0, 22, 23, 24, 30, 40, 41)] == [0, 0, 1, 2, 2, 2, 3]


def test_segments_without_retries_are_written_as_ever(stores):
    attributes = replace(stores.two_levels, segments=(BASE, RETRY)).to_attributes()
    first, second = attributes["segments"]
    assert "retries" not in first
    assert second["retries"] == 2
    assert StoreSpec.from_attributes(attributes, "x").segments == (BASE, RETRY)
    for wrong in (-1, True, "2", 1.5):
        second["retries"] = wrong
        with pytest.raises(CodesError, match="expected a whole number"):
            StoreSpec.from_attributes(attributes, "x")
