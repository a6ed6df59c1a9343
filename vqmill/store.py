"""Reads a code store: `open_codes`, indexing, samples, batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vqmill import layout
from vqmill.errors import CodesError
from vqmill.level import LevelArray
from vqmill.loader import CodeBatches, LastBatch
from vqmill.places import Folder, Place, Where, place_of, read_file
from vqmill.reader import RowReader
from vqmill.source import checked_integer
from vqmill.spec import LevelSpec, StoreSpec
from vqmill.stored import stored_array

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

ROW_COLUMN = "__row"
LOADER_CACHE_BYTES = 1024 * 1024  # of each array: chunks that two pools share, and labels, whose chunks serve many


def open_codes(path: Where, *, allow_incomplete: bool = False, any_layout: bool = False) -> Codes:
    """Opens a code store for reading.

    Args:
        path: the store's folder, or its address in an object store: `s3://bucket/codes.zarr` (also gs, az, https; needs the extra `s3`;
            credentials, region and endpoint are those of the environment, AWS_ACCESS_KEY_ID and so on).
        allow_incomplete: also open a store whose job has not finished; its committed rows are whole and right, but not all. Without it,
            a store that is being appended to opens with the rows that it had.
        any_layout: also read arrays whose chunks are encoded by the core codecs, but arranged otherwise than docs/format.md says, with
            zarr-python: slowly, and only for stores that you trust, for it takes memory on the word of their chunks.

    Raises:
        CodesError: no store there, a newer format, damaged metadata, or an unfinished job.
    """
    place = place_of(path)
    spec = layout.read_spec(place)
    if not spec.complete and not allow_incomplete:
        finished = spec.segments[-1].first_row if spec.segments else 0
        if not 0 < finished <= spec.num_rows:  # more, when a repair has stepped back behind them
            raise CodesError(
                f"{place.name}: unfinished: {spec.num_rows:,} rows are committed, and some are missing or still to come. Run the command that makes it "
                "(`vqmill tokenize ...`) again to finish it, or, in Python, open it with allow_incomplete=True."
            )
        num_commits = -(-finished // spec.rows_per_shard)
        spec = spec.with_progress(num_rows=finished, num_commits=num_commits, complete=True)
        before, retries = sum(segment.retries for segment in spec.segments[:-1]), spec.segments[-1].retries
        return Codes(place, spec, any_layout=any_layout, lines=(before, before + retries if retries else None))
    return Codes(place, spec, any_layout=any_layout)


class Codes:
    """An open code store: row i of every level, of `labels` and of `samples()` is the same sample."""

    def __init__(
        self, place: Place, spec: StoreSpec, *, any_layout: bool = False, lines: tuple[int, int | None] | None = None
    ) -> None:
        self.place = place
        self._any_layout = any_layout
        again = sum(segment.retries for segment in (spec.segments if spec.complete else spec.segments[:-1]))
        self._lines = lines or (again, None)  # of the quarantine, those that count
        self.spec = spec
        self._arrays = {level.name: self._open(level.name, level) for level in spec.levels}
        self._labels = self._open(layout.LABEL, None)

    def __reduce__(self) -> tuple[Callable[..., Codes], tuple[Place, StoreSpec]]:
        """A copy, in this process or another one, opens its own files."""
        return partial(Codes, any_layout=self._any_layout, lines=self._lines), (self.place, self.spec)

    def __len__(self) -> int:
        return self.spec.num_rows

    def __repr__(self) -> str:
        levels = ", ".join(
            f"{level.name} {'x'.join(map(str, level.grid))} of {level.codebook_size}" for level in self.spec.levels
        )
        return f"Codes({self.place.name!r}: {len(self):,} rows; {levels})"

    @property
    def path(self) -> Path:
        """The store's folder.

        Raises:
            CodesError: it lies in an object store.
        """
        if isinstance(self.place, Folder):
            return self.place.path
        raise CodesError(f"{self.place.name}: this is done with a store on a disk only. Copy it there first.")

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, coarse to fine."""
        return tuple(level.name for level in self.spec.levels)

    def __getitem__(self, level: str) -> LevelArray:
        """The codes of one level.

        Raises:
            CodesError: no such level.
        """
        if level == layout.LABEL:
            raise CodesError(
                "labels are no level: codes.labels has all of them, codes.label_array reads what is indexed."
            )
        self.spec.level(level)
        return self._arrays[level]

    @property
    def label_array(self) -> LevelArray:
        """The labels, read as they are indexed; see `labels`."""
        return self._labels

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """Every row's label, int64 [N]; -1 where there is none."""
        return self._labels[:]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label, empty when the corpus gave none."""
        return tuple(self.spec.corpus.get("class_names") or ())

    def samples(self, start: int = 0, stop: int | None = None) -> pa.Table:
        """What is known of rows start..stop-1: key, source, label, caption, size (docs/format.md has the columns).

        Raises:
            CodesError: a part of the table is missing or damaged.
        """
        import pyarrow as pa

        from vqmill.tables import SAMPLES_SCHEMA

        first, last, _ = slice(start, stop).indices(len(self))
        if first >= last:
            return SAMPLES_SCHEMA.empty_table()
        rows_per_shard = self.spec.rows_per_shard
        begin = first // rows_per_shard
        parts = [
            self.table(
                layout.samples_file(shard), SAMPLES_SCHEMA, min(rows_per_shard, len(self) - shard * rows_per_shard)
            )
            for shard in range(begin, (last - 1) // rows_per_shard + 1)
        ]
        return pa.concat_tables(parts).slice(first - begin * rows_per_shard, last - first)

    def samples_at(self, rows: np.ndarray[Any, Any]) -> pa.Table:
        """The same of any rows, in their order: `samples_at(batch["row"])`. Each part that holds one of them is read.

        Args:
            rows: int64 [n].

        Raises:
            IndexError: a row that is not there.
            CodesError: a part of the table is missing or damaged.
        """
        import pyarrow as pa

        from vqmill.tables import SAMPLES_SCHEMA

        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1:
            raise IndexError(f"a list of row numbers is expected, got shape {rows.shape}")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")
        distinct, places = np.unique(rows, return_inverse=True)
        shards = distinct // self.spec.rows_per_shard
        parts = [SAMPLES_SCHEMA.empty_table()]
        for shard in np.unique(shards).tolist():
            first = shard * self.spec.rows_per_shard
            parts.append(self.samples(first, first + self.spec.rows_per_shard).take(distinct[shards == shard] - first))
        return pa.concat_tables(parts).take(places)

    def sample_keys(self) -> list[str]:
        """Every row's sample key: one column of `samples()`, read part by part.

        Raises:
            CodesError: a part of the samples table is missing or damaged.
        """
        keys: list[str] = []
        for first in range(0, len(self), self.spec.rows_per_shard):
            file = layout.samples_file(first // self.spec.rows_per_shard)
            part = self._parquet(file, ["key"])
            expected = min(self.spec.rows_per_shard, len(self) - first)
            if part.num_rows < expected or part.column_names != ["key"]:
                raise CodesError(
                    f"{self.place.name}/{file}: {part.num_rows:,} rows of {', '.join(part.column_names)}, expected {expected:,} of key. "
                    f"See: vqmill verify {self.place.name}"
                )
            keys += cast("list[str]", part["key"].slice(0, expected).to_pylist())
        return keys

    def select(
        self, *, labels: Sequence[int] | None = None, where: pc.Expression | None = None
    ) -> np.ndarray[Any, Any]:
        """Numbers of the rows that are wanted, int64, ascending: for `batches(rows=...)` and for indexing.

        Args:
            labels: rows with one of these labels; MISSING_LABEL (-1) for rows without one.
            where: rows of the samples table for which it is true: `pyarrow.compute.field("width") >= 256`.

        Raises:
            CodesError: a part of the table is missing or damaged, or the expression does not fit its columns.
        """
        import pyarrow as pa

        if labels is None:
            chosen = np.arange(len(self))
        else:
            wanted = [checked_integer("label", label, -(2**63), 2**63 - 1) for label in labels]
            chosen = np.flatnonzero(np.isin(self.labels, wanted))
        if where is None:
            return chosen
        found: list[np.ndarray[Any, Any]] = [np.empty(0, np.int64)]
        for first in range(0, len(self), self.spec.rows_per_shard):
            part = self.samples(first, first + self.spec.rows_per_shard)
            numbered = part.append_column(ROW_COLUMN, pa.array(np.arange(first, first + part.num_rows)))
            try:
                found.append(np.asarray(numbered.filter(where)[ROW_COLUMN]))
            except (pa.ArrowException, TypeError) as error:
                raise CodesError(
                    f"{self.place.name}: the samples table cannot be filtered by {where} ({error}); its columns are {', '.join(part.column_names)}."
                ) from error
        return np.intersect1d(chosen, np.concatenate(found), assume_unique=True)

    def quarantine(self, *, history: bool = False) -> pa.Table:
        """The samples that are set aside, with the newest reason for each.

        Args:
            history: give what was said of samples before they were tried again, too. (While a retry is under way both are given of some.)

        Raises:
            CodesError: a part of the table is missing or damaged.
        """
        import pyarrow as pa

        from vqmill.tables import QUARANTINE_SCHEMA

        parts = [self.table(layout.quarantine_file(shard), QUARANTINE_SCHEMA) for shard in range(self.spec.num_commits)]
        lines = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *parts])
        first, stop = self._lines
        return lines if history else lines.slice(first, None if stop is None else stop - first)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        last: LastBatch = "keep",
        levels: Sequence[str] | None = None,
        rows: np.ndarray[Any, Any] | None = None,
        pool_bytes: int | None = None,
        threads: int | None = None,
    ) -> CodeBatches:
        """Batches of one epoch each time it is iterated: `{"top": uint16 [B, h, w], ..., "label": int64 [B], "row": int64 [B]}`.

        Args:
            batch_size: rows of a batch on this rank.
            shuffle: another order every epoch, a function of (seed, epoch), the chosen rows and the pools: not of `threads`; and, as long
                as pools are the default, the global batch is the same, the world size divides 32 and the rows do not all fit into memory
                at once, not of the world size either.
            seed: names the order.
            rank: which of the `world_size` equal parts of each global batch is ours. Without shuffling, rank r reads the r-th stretch of
                the rows.
            world_size: how many ranks share an epoch.
            last: what is done with the ragged end: `keep` it (ranks may then differ by a batch), `drop` it, or `pad` it with
                rows from the beginning of the epoch's order so that all ranks get equally many full batches.
            levels: which levels to read; all by default.
            rows: only these rows (int64, distinct): one side of a split, or what `select` found.
            pool_bytes: memory of this rank for reading: rows that are not yet given out, chunks in hand. It is kept for the next epoch. The larger, the closer to a full shuffle; if not
                given, what brings the variance of batch means within 1.25 of independent draws, up to 512 MiB.
            threads: that read and decode; one for each core, up to 8, if not given.

        Raises:
            CodesError: an option out of its range.
        """
        if isinstance(levels, str):
            raise CodesError(f"levels must be a list of names, got {levels!r}: write [{levels!r}].")
        names = tuple(levels) if levels is not None else self.levels
        for name in names:
            self.spec.level(name)
        return CodeBatches(
            self, batch_size, levels=names, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, last=last, rows=rows,
            pool_bytes=pool_bytes, threads=threads,
        )  # fmt: skip

    def table(self, name: str, schema: pa.Schema, rows: int | None = None) -> pa.Table:
        """One Parquet part, with exactly these columns and (when given) its first so many rows: a writer may have added some.

        Raises:
            CodesError: the part cannot be read, or has other columns or fewer rows.
        """
        table = self._parquet(name, schema.names)  # what later releases may add is left out
        if table.schema != schema or (rows is not None and table.num_rows < rows):
            raise CodesError(
                f"{self.place.name}/{name}: {table.num_rows} rows of {', '.join(table.column_names)}; expected "
                f"{'rows' if rows is None else rows} of {', '.join(schema.names)}. See: vqmill verify {self.place.name}"
            )
        return table if rows is None else table.slice(0, rows)

    def _parquet(self, file: str, columns: list[str]) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from vqmill.tables import MAX_PART_BYTES, MAX_PART_ROWS, check_part

        try:
            found = pq.ParquetFile(pa.BufferReader(read_file(self.place, file, MAX_PART_BYTES)))
            check_part(found, MAX_PART_ROWS)
            return found.read(columns=columns)  # pyright: ignore[reportUnknownMemberType]
        except (OSError, pa.ArrowException, CodesError) as error:
            raise CodesError(
                f"{self.place.name}/{file}: cannot be read ({error}). See: vqmill verify {self.place.name}"
            ) from error

    def row_readers(self, levels: Sequence[str]) -> dict[str, RowReader]:
        """Readers of some levels and of the labels, for loaders: they keep few decoded chunks."""
        arrays = {layout.LABEL: self._labels, **{name: self[name] for name in levels}}
        return {name: array.row_reader(LOADER_CACHE_BYTES) for name, array in arrays.items()}

    def _open(self, name: str, level: LevelSpec | None) -> LevelArray:
        source = stored_array(self.place, self.spec, level, any_layout=self._any_layout)
        kind = f"level '{name}'" if level else f"array '{name}'"
        return LevelArray(
            source, self.spec.num_rows, f"{self.place.name}: {kind}", level.codebook_size if level else None
        )
