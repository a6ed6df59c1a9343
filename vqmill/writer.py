"""Writes a code store: whole Zarr shards in any order, commits in corpus order.

`write_shard` is called by anyone, anywhere; `StoreWriter` is the one process that decides what counts. After a kill at any moment the
store opens with the rows that its group metadata counts, and nothing else is believed.

A finished store grows by a segment: its last Zarr shard is opened again and written anew, with new rows behind the old ones. This is
safe at every moment. Files of that Zarr shard are replaced one by one, before its record: each begins with the same rows, so whoever
reads no more rows than the group counts reads right from the old and from the new. A kill leaves some files new and the record old:
`missing_shards` names the Zarr shard (its contents are not the recorded ones), it is made again from the corpus as the record says, and
reopened once more. A kill between the record and the group's metadata leaves a record whose files are all in place: it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vqmill import layout
from vqmill.commits import Commit, Counts, Cursor, file_facts
from vqmill.errors import CodesError, UsageError
from vqmill.places import Hold, Place, Where, place_of, read_file
from vqmill.settings import refuse_other_settings
from vqmill.spec import CODECS, Segment, StoreSpec

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

READERS = 16  # commit records read at a time: each is a request where the store lies in a bucket


def write_shard(
    store: Where,
    spec: StoreSpec,
    shard: int,
    codes: Mapping[str, np.ndarray[Any, Any]],
    samples: pa.Table,
    quarantine: pa.Table,
    expected: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes every file of one Zarr shard, each whole and durable; nothing counts until `StoreWriter.commit`.

    Args:
        store: the store's folder or address.
        spec: its specification, as the writer has it: with the codec that was chosen.
        shard: the number of this Zarr shard.
        codes: by level, integers [n, *grid], n <= rows_per_shard; n is 0 only when a whole corpus gave nothing but quarantine rows.
        samples: n rows of SAMPLES_SCHEMA.
        quarantine: rows of QUARANTINE_SCHEMA.
        expected: what the files must be, as a commit record keeps it; nothing is written when they are not, for `StoreWriter.accept_again`
            to refuse them.

    Returns:
        Size and checksum of each file, by its path in the store: what the commit record keeps.
    """
    files: dict[str, bytes] = {}
    if samples.num_rows:
        for level in spec.levels:
            assert len(codes[level.name]) == samples.num_rows, (
                f"{level.name}: {len(codes[level.name])} rows, {samples.num_rows} samples"
            )
            files[layout.shard_file(level.name, shard, len(level.grid))] = layout.encode_zarr_shard(
                spec, level, codes[level.name]
            )
        labels = layout.label_column(samples)
        files[layout.shard_file(layout.LABEL, shard, 0)] = layout.encode_label_shard(spec, labels)
    files[layout.samples_file(shard)] = layout.parquet_bytes(samples)
    files[layout.quarantine_file(shard)] = layout.parquet_bytes(quarantine)
    facts = {name: file_facts(data) for name, data in files.items()}
    if expected is None or facts == expected:
        place = place_of(store)
        for name, data in files.items():
            place.write(name, data)
    return facts


def read_shard(
    store: Where, spec: StoreSpec, commit: Commit
) -> tuple[dict[str, np.ndarray[Any, Any]], pa.Table, pa.Table]:
    """Reads a committed Zarr shard back: codes by level [rows, *grid] in the stored dtype, samples, quarantine.

    Raises:
        CodesError: a file is not the committed one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = place_of(store)

    def read(name: str) -> bytes:
        facts = commit.files.get(name, {})
        try:
            data = _read(place, name, facts.get("bytes", 0))
            wrong = None if file_facts(data) == facts else "not what was committed"
        except FileNotFoundError:
            data, wrong = b"", "missing"
        except CodesError as error:
            data, wrong = b"", f"not what was committed: {error}"
        if wrong:
            raise CodesError(f"{place.name}/{name}: {wrong}. See: vqmill verify {place.name}")
        return data

    def table(name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(read(name)))  # pyright: ignore[reportUnknownMemberType]

    codes = {
        level.name: layout.decode_zarr_shard(
            spec, level, read(layout.shard_file(level.name, commit.shard, len(level.grid))), commit.rows
        )
        for level in (spec.levels if commit.rows else ())
    }
    return codes, table(layout.samples_file(commit.shard)), table(layout.quarantine_file(commit.shard))


def refuse_other_store(store: Where, found: StoreSpec, wanted: StoreSpec, advice: str) -> None:
    """Says how a store that is there was made differently. A codec that one of the two leaves open is no difference.

    Raises:
        UsageError: it was.
    """
    codec = wanted.codec or found.codec
    there, now = replace(found, codec=found.codec or codec), replace(wanted, codec=codec)
    refuse_other_settings(place_of(store).name, there.settings(), now.settings(), advice)


class StoreWriter:
    """The one writer of a store: creates or resumes it, takes commits in order, and finishes it.

    Use it as a context manager: it holds a lock, so that a second job on the same store is refused.
    """

    def __init__(self, store: Where, spec: StoreSpec) -> None:
        """Creates the store, or takes up the one that is there.

        Args:
            store: the folder or address, with a name of its own.
            spec: what this job would write; progress fields are ignored. A `codec` of None takes what the store has.

        Raises:
            CodesError: the store was made with other settings (the difference is shown), its records are damaged, or another job is
                writing it.
            OSError: files of it cannot be read or written.
        """
        self.store = place_of(store)
        self._codec = spec.codec
        self._hold: Hold = self.store.hold(
            "Another job is writing this store. Wait for it to end, or choose another --out.", layout.GROUP
        )
        try:
            if found := layout.find_spec(self.store):
                self.spec = found
                origin = self.spec.corpus.get("description")
                advice = "Choose another --out, or repeat the settings it was made with."
                refuse_other_store(
                    self.store, self.spec, spec, f"It was made from {origin}. {advice}" if origin else advice
                )
            else:
                self.spec = spec.with_progress(num_rows=0, num_commits=0, complete=False)
                self._hold.create(layout.array_metadata(self.spec), layout.group_metadata(self.spec))
            self.commits = read_commits(self.store, range(self.spec.num_commits))
            if not self.spec.complete:
                self._sweep()
                self._publish_arrays()  # a kill inside a commit leaves them ahead of the rows that count
            self._believe_last_record()
            if self._codec is not None and self.spec.codec is None:
                self.choose_codec(self._codec)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another job write the store."""
        self._hold.close()

    @property
    def cursor(self) -> Cursor:
        """Where the next Zarr shard begins."""
        return self.commits[-1].cursor if self.commits else Cursor()

    @property
    def counts(self) -> Counts:
        """Samples over all commits."""
        return sum((commit.counts for commit in self.commits), Counts())

    def choose_codec(self, codec: str) -> None:
        """Sets how chunks are compressed, before the first row."""
        assert not self.spec.num_rows, "the rows that are there are compressed already"
        self.spec = replace(self.spec, codec=codec)
        self._publish(complete=False)

    def record_machines(self, computed_on: str) -> None:
        """Says of what kinds the machines are that make the codes, before rows of another kind count."""
        self.spec = replace(self.spec, tokenizer={**self.spec.tokenizer, "computed_on": computed_on})
        self._publish(complete=False)

    def grow(self, plan: str, input_shards: int, num_samples: int, corpus: Mapping[str, Any], retries: int = 0) -> None:
        """Takes up a longer plan, of which the store's is a true beginning.

        A finished store gets a segment, and goes on. In an unfinished one the longer plan takes the place of the shorter, which nobody
        has seen finished. The last Zarr shard is opened again in both cases: see `rewrite_last`.

        Args:
            plan: digest of the longer plan.
            input_shards: how many it has.
            num_samples: how many they hold.
            corpus: what the store says of it from now on.
            retries: quarantine lines that it takes up, all that count: its further input shards are these samples. The store is finished.
        """
        last = self.spec.segments[-1]
        assert input_shards > last.input_shards, f"{input_shards} input shards are not more than {last.input_shards}"
        assert self.spec.complete or not (retries or last.retries), (
            "a retry is a segment of its own, and is finished first"
        )
        first_row = self.spec.num_rows if self.spec.complete else last.first_row
        grown = Segment(plan, first_row, first_row // self.spec.rows_per_shard, input_shards, num_samples, retries)
        kept = self.spec.segments if self.spec.complete else self.spec.segments[:-1]
        codec = self.spec.codec if self.spec.num_rows else self._codec  # of no rows, a new choice is as good
        self.spec = replace(self.spec, segments=(*kept, grown), corpus=corpus, codec=codec)
        self._publish(complete=False)

    def missing_shards(self) -> list[int]:
        """Committed Zarr shards of which a file is missing or has another size.

        Of the last one contents are compared, too: a kill while it was opened again leaves some of its files new.
        """
        there = self.store.list()
        return [
            commit.shard
            for commit in self.commits
            if not all(
                there.get(name) == facts["bytes"]
                and (commit is not self.commits[-1] or file_facts(_read(self.store, name, facts["bytes"])) == facts)
                for name, facts in commit.files.items()
            )
        ]

    def accept_again(self, shard: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Accepts the files of a committed Zarr shard that were made again.

        Args:
            shard: its number.
            files: what `write_shard` returned, called with the record's `files` as `expected`.

        Raises:
            CodesError: they are not what was committed.
        """
        commit = self.commits[shard]
        if files != commit.files:
            names = sorted(files.keys() | commit.files.keys())
            other = ", ".join(name for name in names if files.get(name) != commit.files.get(name))
            raise CodesError(
                f"{self.store.name}: Zarr shard {shard} ({commit.rows} rows from row {commit.first_row}) was made again and came out differently "
                f"({other}): the corpus, the tokenizer or the software is not what made this store. Nothing was written. "
                "Use what made it, or restore these files from a copy."
            )

    def rewrite_last(self, rows: int, cursor: Cursor, counts: Counts, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Makes the last Zarr shard count again, after it was opened and written anew with more behind what it held."""
        last = self.commits[-1]
        assert not self.spec.complete, "a finished store is not written to"
        assert last.rows <= rows <= self.spec.rows_per_shard, f"{rows} rows where {last.rows} were"
        assert set(files) == set(layout.shard_files(self.spec, last.shard, rows)), sorted(files)
        record = Commit(last.shard, last.first_row, rows, cursor, counts, files)
        self._record(record)
        self.commits[-1] = record
        self._publish(complete=False)

    def commit(self, rows: int, cursor: Cursor, counts: Counts, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Makes the next Zarr shard count: its record, then each array's metadata, then the group's."""
        assert not self.spec.complete, "commit to a finished store"
        assert self.spec.num_rows == self.spec.num_commits * self.spec.rows_per_shard, (
            "only the last Zarr shard is ragged"
        )
        assert 0 <= rows <= self.spec.rows_per_shard, f"{rows} rows in a Zarr shard of {self.spec.rows_per_shard}"
        assert set(files) == set(layout.shard_files(self.spec, self.spec.num_commits, rows)), sorted(files)
        record = Commit(self.spec.num_commits, self.spec.num_rows, rows, cursor, counts, files)
        self._record(record)
        self.commits.append(record)
        self._publish(complete=False)

    def finish(self) -> None:
        """Says that the whole plan is in, and nothing else: what orphaned processes of a killed job wrote meanwhile is removed."""
        if not self.spec.complete:
            self._hold.check()
            self._sweep()
            self._publish(complete=True)

    def _record(self, record: Commit) -> None:
        self._hold.check()
        self.store.write(layout.commit_file(record.shard), record.to_bytes())

    def _publish(self, *, complete: bool) -> None:
        rows = sum(commit.rows for commit in self.commits)
        chosen = self.spec.codec or (CODECS[0] if rows or complete else None)  # what layout.py takes for None
        spec = replace(self.spec, codec=chosen)
        self.spec = spec.with_progress(num_rows=rows, num_commits=len(self.commits), complete=complete)
        self._publish_arrays()
        self._hold.publish(layout.group_metadata(self.spec))

    def _publish_arrays(self) -> None:
        for name, data in layout.array_metadata(self.spec).items():
            if self._metadata(name) != data:
                self.store.write(name, data)

    def _metadata(self, name: str) -> bytes | None:
        try:
            return _read(self.store, name, layout.MAX_METADATA_BYTES)
        except (FileNotFoundError, CodesError):  # to be written anew in any case
            return None

    def _believe_last_record(self) -> None:
        """A kill between the new record of the last Zarr shard and the group's metadata: the record's files are all in place."""
        rows = sum(commit.rows for commit in self.commits)
        if rows > self.spec.num_rows >= self.commits[-1].first_row and not self.spec.complete:
            self._publish(complete=False)
        elif rows != self.spec.num_rows:
            raise CodesError(
                f"{self.store.name}: zarr.json counts {self.spec.num_rows:,} rows, the commit records {rows:,}. See: vqmill verify {self.store.name}"
            )

    def _sweep(self) -> None:
        """Removes what a killed job left: half-written files, and Zarr shards that no commit counts."""
        known = set(committed_files(self.spec, self.commits))
        found = self.store.list()
        for name in found:
            if self.store.is_link(name):
                raise UsageError(
                    f"{self.store.name}/{name}: a symbolic link inside a store that is being written. Put what it leads to in its place."
                )
        self.store.delete(name for name in found if name not in known)


def _read(place: Place, file: str, max_bytes: int) -> bytes:
    """As `read_file`; what fails is said with its place."""
    try:
        return read_file(place, file, max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{place.name}/{file}: cannot be read: {error}") from error


def read_commits(store: Where, shards: Iterable[int]) -> list[Commit]:
    """The records of some Zarr shards.

    Raises:
        CodesError: one is missing or damaged.
        OSError: one cannot be had.
    """
    place = place_of(store)
    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(partial(Commit.read, place), map(layout.commit_file, shards)))


def committed_files(spec: StoreSpec, commits: list[Commit]) -> Iterator[str]:
    """Every file that belongs to a store, by its path in it."""
    yield layout.GROUP
    yield from layout.array_metadata(spec)
    for commit in commits:
        yield layout.commit_file(commit.shard)
        yield from commit.files
