"""Writes a code store: whole Zarr shards in any order, commits in corpus order.

`write_shard` is called by anyone, anywhere; `StoreWriter` is the one process that decides what counts. After a kill at any moment the
store opens with the rows that its group metadata counts, and nothing else is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vqmill import layout
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, hold_lock, sealed, sync_folder, write_whole
from vqmill.settings import refuse_other_settings
from vqmill.spec import StoreSpec

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True)
class Counts:
    """Input samples: seen = encoded + quarantined + skipped."""

    encoded: int = 0
    quarantined: int = 0
    skipped: int = 0

    @property
    def seen(self) -> int:
        """All samples met."""
        return self.encoded + self.quarantined + self.skipped

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.encoded + other.encoded, self.quarantined + other.quarantined, self.skipped + other.skipped)


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus the next Zarr shard begins: an input shard, a span in it, and rows of that span already written."""

    input_shard: int = 0
    span: int = 0
    row: int = 0


@dataclass(frozen=True)
class Commit:
    """The record that makes one Zarr shard count."""

    shard: int
    first_row: int
    rows: int
    cursor: Cursor
    counts: Counts
    files: Mapping[str, Mapping[str, Any]]

    def to_bytes(self) -> bytes:
        """The file's content: nothing of time, place or number of workers."""
        return canonical_json(sealed(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Commit:
        """Reads a record.

        Raises:
            CodesError: missing or damaged.
        """
        try:
            record = json.loads(path.read_bytes())
            if sealed(record) != record:
                raise ValueError("not what its sha256 says")
            numbers = [record[key] for key in ("shard", "first_row", "rows")]
            numbers += [record["cursor"][field.name] for field in fields(Cursor)]
            numbers += [record["counts"][field.name] for field in fields(Counts)]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("numbers must be whole")
            return cls(
                shard=int(record["shard"]),
                first_row=int(record["first_row"]),
                rows=int(record["rows"]),
                cursor=Cursor(**record["cursor"]),
                counts=Counts(**record["counts"]),
                files={str(name): dict(facts) for name, facts in record["files"].items()},
            )
        except FileNotFoundError as error:
            raise CodesError(f"{path}: this commit record is missing. Restore it from a copy.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CodesError(f"{path}: damaged commit record ({error}). Restore it from a copy.") from error


def file_facts(data: bytes) -> dict[str, Any]:
    """What a commit record says of a file: its size in bytes and its SHA-256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_shard(
    store: Path,
    spec: StoreSpec,
    shard: int,
    codes: Mapping[str, np.ndarray[Any, Any]],
    samples: pa.Table,
    quarantine: pa.Table,
) -> dict[str, dict[str, Any]]:
    """Writes every file of one Zarr shard, each whole and durable; nothing counts until `StoreWriter.commit`.

    Args:
        store: the store's folder.
        spec: its specification.
        shard: the number of this Zarr shard.
        codes: by level, integers [n, *grid], n <= rows_per_shard; n is 0 only when a whole corpus gave nothing but quarantine rows.
        samples: n rows of SAMPLES_SCHEMA.
        quarantine: rows of QUARANTINE_SCHEMA.

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
    for name, data in files.items():
        write_whole(store / name, data)
    return {name: file_facts(data) for name, data in files.items()}


class StoreWriter:
    """The one writer of a store: creates or resumes it, takes commits in order, and finishes it.

    Use it as a context manager: it holds a lock, so that a second job on the same store is refused.
    """

    def __init__(self, store: Path, spec: StoreSpec) -> None:
        """Creates the store, or takes up the one that is there.

        Args:
            store: the folder, with a name of its own.
            spec: what this job would write; progress fields are ignored.

        Raises:
            CodesError: the store was made with other settings (the difference is shown), or another job is writing it.
        """
        self.store = store
        self._lock: int | None = hold_lock(
            store, "Another job is writing this store. Wait for it to end, or choose another --out."
        )
        try:
            if (store / "zarr.json").exists():
                self.spec = layout.read_spec(store)
                origin = self.spec.corpus.get("description")
                advice = "Choose another --out, or repeat the settings it was made with."
                refuse_other_settings(
                    str(store),
                    self.spec.settings(),
                    spec.settings(),
                    f"It was made from {origin}. {advice}" if origin else advice,
                )
            elif store.exists() and (not store.is_dir() or any(store.iterdir())):
                raise UsageError(f"{store}: exists and is not a code store. Choose another --out, or remove it.")
            else:
                self.spec = spec.with_progress(num_rows=0, num_commits=0, complete=False)
                self._create()
            self.commits = [Commit.read(store / layout.commit_file(shard)) for shard in range(self.spec.num_commits)]
            self._sweep()
            self._publish_arrays()  # a kill inside a commit leaves them ahead of the rows that count
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
        """Lets go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def cursor(self) -> Cursor:
        """Where the next Zarr shard begins."""
        return self.commits[-1].cursor if self.commits else Cursor()

    @property
    def counts(self) -> Counts:
        """Samples over all commits."""
        return sum((commit.counts for commit in self.commits), Counts())

    def commit(self, rows: int, cursor: Cursor, counts: Counts, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Makes the next Zarr shard count: its record, then each array's metadata, then the group's."""
        assert not self.spec.complete, "commit to a finished store"
        assert self.spec.num_rows == self.spec.num_commits * self.spec.rows_per_shard, (
            "only the last Zarr shard is ragged"
        )
        assert 0 <= rows <= self.spec.rows_per_shard, f"{rows} rows in a Zarr shard of {self.spec.rows_per_shard}"
        assert set(files) == set(layout.shard_files(self.spec, self.spec.num_commits, rows)), sorted(files)
        record = Commit(self.spec.num_commits, self.spec.num_rows, rows, cursor, counts, files)
        write_whole(self.store / layout.commit_file(record.shard), record.to_bytes())
        self.commits.append(record)
        self._publish(complete=False)

    def finish(self) -> None:
        """Says that the whole plan is in, and nothing else: what orphaned processes of a killed job wrote meanwhile is removed."""
        if not self.spec.complete:
            self._sweep()
            self._publish(complete=True)

    def _publish(self, *, complete: bool) -> None:
        rows = sum(commit.rows for commit in self.commits)
        self.spec = self.spec.with_progress(num_rows=rows, num_commits=len(self.commits), complete=complete)
        self._publish_arrays()
        write_whole(self.store / "zarr.json", layout.group_metadata(self.spec))

    def _publish_arrays(self) -> None:
        for name, data in layout.array_metadata(self.spec).items():
            if not (self.store / name).exists() or (self.store / name).read_bytes() != data:
                write_whole(self.store / name, data)

    def _create(self) -> None:
        beside = self.store.with_name(f".{self.store.name}.new")  # a name that only we use, as that of the lock
        if beside.exists():
            shutil.rmtree(beside)  # left by a killed job: the lock is held, and a store is renamed before its first row
        for name, data in layout.array_metadata(self.spec).items():
            write_whole(beside / name, data)
        write_whole(beside / "zarr.json", layout.group_metadata(self.spec))
        beside.rename(self.store)
        sync_folder(self.store.parent)

    def _sweep(self) -> None:
        """Removes what a killed job left: half-written files, and Zarr shards that no commit counts."""
        known = set(committed_files(self.spec, self.commits))
        for path in files_of(self.store):
            if path.relative_to(self.store).as_posix() not in known:
                path.unlink(missing_ok=True)  # an orphan may rename its half-written file under our hands


def committed_files(spec: StoreSpec, commits: list[Commit]) -> Iterator[str]:
    """Every file that belongs to a store, by its path in it."""
    yield "zarr.json"
    yield from layout.array_metadata(spec)
    for commit in commits:
        yield layout.commit_file(commit.shard)
        yield from commit.files


def files_of(store: Path) -> Iterator[Path]:
    """Every file below a store's folder, in sorted order."""
    for path in sorted(store.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path
