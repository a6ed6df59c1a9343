"""Which rows of a store are copied: all of them, a range, those of some labels; and what they count."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqmill.commits import Commit, Counts
from vqmill.errors import CodesError
from vqmill.files import canonical_json
from vqmill.layout import group_metadata, label_column, quarantine_file, read_spec, samples_file
from vqmill.spec import MISSING_LABEL
from vqmill.store import Codes
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import read_commits

SPAN_ROWS = 256  # rows of a span, in which the cursor of a copy counts
IDENTITY = ("input_shard", "index", "key", "source")  # rows that follow each other with these equal are of one sample

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Carried:
    """The lines of a quarantine part from `first_line` on, and what they count; those before were tried again."""

    shard: int
    first_line: int
    counts: Counts


@dataclass(frozen=True)
class Source:
    """Rows of a finished store that are to be copied, in spans of SPAN_ROWS.

    Attributes:
        codes: the store.
        rows: numbers of the rows, ascending: a range, or int64 [n].
        digest: names the store's content and the selection.
        encoded: int64 [spans], how many samples begin in each span.
        labels: how many of the rows have each label; MISSING_LABEL for none.
        keys: int64 [n], hashes of the rows' sample keys, comparable in this process only.
        table_bytes: what the store's tables take on the disk.
        carried: by span, what of the store's quarantine comes along with it.
    """

    codes: Codes
    rows: range | Rows
    digest: str
    encoded: Rows
    labels: Mapping[int, int]
    keys: Rows
    table_bytes: int
    carried: Mapping[int, tuple[Carried, ...]] = field(default_factory=dict[int, "tuple[Carried, ...]"])

    @property
    def counts(self) -> Counts:
        """Samples of all spans."""
        return sum((_set_aside(parts) for parts in self.carried.values()), Counts(int(self.encoded.sum())))

    @property
    def num_spans(self) -> int:
        """One at least, which may be without rows."""
        return len(self.encoded)

    @property
    def has_labels(self) -> bool:
        """Whether any of the rows has a label."""
        return any(label != MISSING_LABEL for label in self.labels)

    def span_rows(self, span: int) -> int:
        """Rows of a span."""
        return min(SPAN_ROWS, len(self.rows) - span * SPAN_ROWS)

    def span_counts(self, span: int) -> Counts:
        """Samples of a span: those that begin in it, and those set aside that come along with it."""
        return Counts(int(self.encoded[span])) + _set_aside(self.carried.get(span, ()))

    def read_codes(self, level: str, first: int, stop: int) -> np.ndarray[Any, Any]:
        """Codes of the selected rows first..stop-1 (places in the selection): [stop - first, *grid].

        Raises:
            CodesError: damaged.
        """
        rows, values = self.rows[first:stop], self.codes[level]
        if isinstance(rows, range):
            return values[rows.start : rows.stop]
        # By Zarr shard, for the memory that scattered rows take while they are read grows with the rows between them.
        return np.concatenate([values[part] for part in _by_shard(rows, self.codes.spec.rows_per_shard)])

    def read_samples(self, first: int, stop: int) -> pa.Table:
        """Their lines of the samples table, as they are.

        Raises:
            CodesError: damaged.
        """
        return _samples_of(self.codes, np.asarray(self.rows[first:stop], np.int64))

    def read_quarantine(self, span: int) -> pa.Table:
        """The quarantine lines that come along with a span.

        Raises:
            CodesError: damaged.
        """
        parts = [
            self.codes.table(quarantine_file(part.shard), QUARANTINE_SCHEMA).slice(part.first_line)
            for part in self.carried.get(span, ())
        ]
        return pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *parts])

    def refuse_changed(self) -> None:
        """Notices that the store was written to meanwhile.

        Raises:
            CodesError: it was.
        """
        if read_spec(self.codes.place) != self.codes.spec:
            raise CodesError(
                f"{self.codes.place.name}: changed while it was copied. Remove the output, which may hold parts of both states, and run the "
                "command again when no job writes this store."
            )


def whole_store(codes: Codes, progress: Callable[[int, int], None]) -> Source:
    """All rows of a store, and its quarantine lines.

    Lines and counts of samples that were set aside go with the span in which their commit's last row lies: so no more than some
    commits' lines are in memory, and they stay in the order of the corpus.

    Args:
        codes: the store.
        progress: called with (rows read, rows in all).

    Raises:
        CodesError: damaged, or its commits count fewer samples than its rows hold.
    """
    commits = _commits(codes)
    found = _survey(codes, range(len(codes)), None, progress)
    # A sample that stands twice in a row, as a merge can bring, is told from one of two rows by the commits alone.
    more = sum(commit.counts.encoded for commit in commits) - int(found.encoded.sum())
    if more < 0:
        raise CodesError(
            f"{codes.place.name}: its commit records count {-more:,} samples fewer than its samples table holds. See: vqmill verify {codes.place.name}"
        )
    found.encoded[-1] += more
    carried: dict[int, tuple[Carried, ...]] = {}
    again = codes.spec.retried(sum(commit.counts.seen for commit in commits))
    for commit in commits:
        span = max(0, commit.first_row + commit.rows - 1) // SPAN_ROWS
        gone = min(again, commit.counts.quarantined)
        again -= gone
        counts = Counts(quarantined=commit.counts.quarantined - gone, skipped=commit.counts.skipped)
        carried[span] = (*carried.get(span, ()), Carried(commit.shard, gone, counts))
    digest = _digest(codes, commits, {"rows": [0, len(codes)]})
    return Source(codes, found.rows, digest, found.encoded, found.labels, found.keys, _table_bytes(commits), carried)


def part_of_store(
    codes: Codes, rows: range, labels: Collection[int] | None, progress: Callable[[int, int], None]
) -> Source:
    """Rows of a store: those in a range that have one of the labels. Quarantine lines stay behind.

    Args:
        codes: the store.
        rows: the range, of step 1.
        labels: MISSING_LABEL for rows without one; None for any.
        progress: called with (rows read, rows in all).

    Raises:
        CodesError: damaged.
    """
    wanted = None if labels is None else np.unique(np.fromiter(labels, np.int64))
    found = _survey(codes, rows, wanted, progress)
    selection = {"rows": [rows.start, rows.stop], "labels": None if wanted is None else wanted.tolist()}
    commits = _commits(codes)
    digest = _digest(codes, commits, selection)
    return Source(codes, found.rows, digest, found.encoded, found.labels, found.keys, _table_bytes(commits))


@dataclass(frozen=True)
class _Survey:
    """What the samples table says of rows; see `Source`."""

    rows: range | Rows
    encoded: Rows
    labels: Mapping[int, int]
    keys: Rows


def _survey(codes: Codes, rows: range, labels: Rows | None, progress: Callable[[int, int], None]) -> _Survey:
    """Reads the samples of a range part by part, and keeps some bytes of each row that is selected."""
    selected, begins, keys = [np.empty(0, np.int64)], [np.empty(0, bool)], [np.empty(0, np.int64)]
    count: Counter[int] = Counter()
    last, last_row = SAMPLES_SCHEMA.empty_table(), np.empty(0, np.int64)
    for part in _parts(rows, codes.spec.rows_per_shard):
        samples, numbers = codes.samples(part.start, part.stop), np.arange(part.start, part.stop)
        if labels is not None:
            chosen = np.isin(label_column(samples), labels)
            samples, numbers = samples.filter(pa.array(chosen)), numbers[chosen]
        if len(numbers):
            joined = pa.concat_tables([last, samples])
            begins.append(_begins(joined, np.concatenate([last_row, numbers]))[len(last_row) :])
            selected.append(numbers)
            keys.append(np.fromiter(map(hash, samples["key"].to_pylist()), np.int64, len(numbers)))
            values, counts = np.unique(label_column(samples), return_counts=True)
            count.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            last, last_row = samples.slice(len(numbers) - 1), numbers[-1:]
        progress(part.stop - rows.start, len(rows))
    of_span = np.concatenate(begins)
    places = np.arange(0, max(1, len(of_span)), SPAN_ROWS)
    encoded = np.add.reduceat(of_span, places, dtype=np.int64) if len(of_span) else np.zeros(1, np.int64)
    return _Survey(rows if labels is None else np.concatenate(selected), encoded, count, np.concatenate(keys))


def _begins(samples: pa.Table, rows: Rows) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows begin a sample: bool [n]. A sample of several rows has them one behind the other in its store."""
    goes_on = np.diff(rows) == 1
    for name in IDENTITY:
        if goes_on.any():
            column = samples[name]
            goes_on &= np.asarray(pc.equal(column.slice(1), column.slice(0, len(rows) - 1)))
    return np.concatenate([[True], ~goes_on])


def _samples_of(codes: Codes, rows: Rows) -> pa.Table:
    """Lines of the samples table by ascending row number."""
    parts = [SAMPLES_SCHEMA.empty_table()]
    for part in _by_shard(rows, codes.spec.rows_per_shard):
        first, last = int(part[0]), int(part[-1])
        parts.append(codes.samples(first, last + 1).take(part - first))
    return pa.concat_tables(parts)


def _by_shard(rows: Rows, size: int) -> list[Rows]:
    """Ascending row numbers, one part for each Zarr shard of `size` rows that has any of them."""
    shards = rows // size
    return np.split(rows, np.flatnonzero(shards[1:] != shards[:-1]) + 1)


def _parts(rows: range, size: int) -> Iterator[range]:
    """A range cut at the multiples of `size`.

    >>> list(_parts(range(3, 9), 4))
    [range(3, 4), range(4, 8), range(8, 9)]
    """
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // size + 1) * size)
        yield range(start, stop)
        start = stop


def _commits(codes: Codes) -> list[Commit]:
    return read_commits(codes.place, range(codes.spec.num_commits))


def _digest(codes: Codes, commits: list[Commit], selection: dict[str, Any]) -> str:
    """SHA-256, hex: the metadata of a store, its commit records (and so every file), and what is selected."""
    digest = hashlib.sha256(canonical_json(selection))
    digest.update(group_metadata(codes.spec))
    for commit in commits:
        digest.update(commit.to_bytes())
    return digest.hexdigest()


def _table_bytes(commits: list[Commit]) -> int:
    names = {name for commit in commits for name in (samples_file(commit.shard), quarantine_file(commit.shard))}
    facts = (facts for commit in commits for name, facts in commit.files.items() if name in names)
    return sum(int(fact.get("bytes", 0)) for fact in facts)


def _set_aside(parts: tuple[Carried, ...]) -> Counts:
    return sum((part.counts for part in parts), Counts())
