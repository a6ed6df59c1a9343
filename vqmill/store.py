"""Reads a code store: `open_codes`, indexing, samples, batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from zarr.storage import LocalStore

from vqmill import layout
from vqmill.errors import CodesError
from vqmill.loader import CodeBatches, LastBatch
from vqmill.spec import LABEL_FILL, LevelSpec, StoreSpec

if TYPE_CHECKING:
    import pyarrow as pa


def open_codes(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Codes:
    """Opens a code store for reading.

    Args:
        path: the store's folder.
        allow_incomplete: also open a store whose job has not finished; its committed rows are whole and right, but not all.

    Raises:
        CodesError: no store there, a newer format, damaged metadata, or an unfinished job.
    """
    if "://" in os.fspath(path):
        raise CodesError(f"{path}: only local stores are read so far. Copy the store to a disk and open that.")
    codes = Codes(Path(path), layout.read_spec(Path(path)))
    if not codes.spec.complete and not allow_incomplete:
        raise CodesError(
            f"{path}: unfinished: {len(codes):,} rows are committed, more are to come. "
            "Run the same `vqmill tokenize` command to finish it, or, in Python, open it with allow_incomplete=True."
        )
    return codes


class LevelArray:
    """The codes of one level: an array [N, *grid] of unsigned integers that reads what is indexed.

    >>> codes["bottom"][0:8].shape          # doctest: +SKIP
    (8, 64, 64)
    """

    def __init__(self, array: zarr.Array[Any], num_rows: int, name: str, codebook_size: int | None) -> None:
        self._array = array
        self._num_rows = num_rows
        self._name = name  # for errors: the store and the array in it
        self._codebook_size = codebook_size  # None: labels

    def __len__(self) -> int:
        return self._num_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, h, w) or (N, t, h, w)."""
        return (self._num_rows, *self._array.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype: uint8, uint16 or uint32."""
        return self._array.dtype

    def __getitem__(self, key: Any) -> np.ndarray[Any, Any]:
        """Rows by integer, slice (forward), list of integers or boolean mask, then any axes of the grid.

        Raises:
            IndexError: a row that is not there.
        """
        parts = cast("tuple[Any, ...]", key if isinstance(key, tuple) and key else (key,))
        rows, rest = parts[0], parts[1:]
        if rows is Ellipsis:
            missing = len(self.shape) - len(rest)
            rows, rest = slice(None), (*[slice(None)] * (missing - 1), *rest)
        if isinstance(rows, slice):
            return self._read((slice(*rows.indices(self._num_rows)), *rest))
        wanted = np.asarray(rows)
        if isinstance(rows, (int, np.integer)) and not isinstance(rows, bool):
            return self._read((int(self._checked(wanted.reshape(1))[0]), *rest))
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iub"):
            raise IndexError(f"rows are named by integer, slice, list of integers or mask, got {rows!r}")
        if wanted.dtype == bool:
            if wanted.shape != (self._num_rows,):
                raise IndexError(f"a mask over {self._num_rows} rows is expected, got shape {wanted.shape}")
            wanted = np.flatnonzero(wanted)
        return self._read((self._checked(wanted.astype(np.int64)), *rest))

    def _read(self, selection: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        lists = any(not isinstance(part, (int, np.integer, slice, type(Ellipsis))) for part in selection)
        try:
            values = np.asarray(self._array.oindex[selection] if lists else self._array[selection])
        except (OSError, ValueError, RuntimeError) as error:
            raise CodesError(f"{self._name} cannot be read: {error}. Restore it from a copy.") from error
        if self._codebook_size is None:
            if values.size and int(values.min()) == LABEL_FILL:
                raise CodesError(f"{self._name}: labels are missing from its files. Restore them from a copy.")
        elif values.size and int(values.max()) >= self._codebook_size:
            rows = np.atleast_1d(np.arange(self._num_rows)[selection[0]])
            raise CodesError(
                f"{self._name} holds code {int(values.max())} in rows {rows.min()}..{rows.max()}, but codebook_size is "
                f"{self._codebook_size} (valid 0..{self._codebook_size - 1}). Restore it from a copy."
            )
        return values

    def _checked(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if rows.size and (rows.min() < -self._num_rows or rows.max() >= self._num_rows):
            raise IndexError(
                f"row {int(rows.max() if rows.max() >= self._num_rows else rows.min())} is not in 0..{self._num_rows - 1}"
            )
        return np.where(rows < 0, rows + self._num_rows, rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError(
                f"{self._name} is on a disk: it becomes an array only by being copied, so copy=False cannot be had."
            )
        return np.asarray(self[:], dtype=dtype)


class Codes:
    """An open code store: row i of every level, of `labels` and of `samples()` is the same sample."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        self.path = path
        self.spec = spec
        self._arrays = {level.name: self._open(level.name, level) for level in spec.levels}
        self._labels = self._open(layout.LABEL, None)

    def __len__(self) -> int:
        return self.spec.num_rows

    def __repr__(self) -> str:
        levels = ", ".join(
            f"{level.name} {'x'.join(map(str, level.grid))} of {level.codebook_size}" for level in self.spec.levels
        )
        return f"Codes({str(self.path)!r}: {len(self):,} rows; {levels})"

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, coarse to fine."""
        return tuple(level.name for level in self.spec.levels)

    def __getitem__(self, level: str) -> LevelArray:
        """The codes of one level.

        Raises:
            CodesError: no such level.
        """
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

    def sample_keys(self) -> list[str]:
        """Every row's sample key: one column of `samples()`, read part by part.

        Raises:
            CodesError: a part of the samples table is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        keys: list[str] = []
        for shard in range(self.spec.num_commits):
            path = self.path / layout.samples_file(shard)
            try:
                table = pq.read_table(path, columns=["key"], partitioning=None)  # pyright: ignore[reportUnknownMemberType]
                keys += cast("list[str]", table["key"].to_pylist())
            except (OSError, pa.ArrowException, KeyError) as error:
                raise CodesError(f"{path}: cannot be read ({error}). See: vqmill verify {self.path}") from error
        if len(keys) != len(self):
            raise CodesError(
                f"{self.path}: {len(keys):,} rows of samples, but {len(self):,} of codes. See: vqmill verify {self.path}"
            )
        return keys

    def quarantine(self) -> pa.Table:
        """The samples that were set aside, with the reason for each.

        Raises:
            CodesError: a part of the table is missing or damaged.
        """
        import pyarrow as pa

        from vqmill.tables import QUARANTINE_SCHEMA

        parts = [self.table(layout.quarantine_file(shard), QUARANTINE_SCHEMA) for shard in range(self.spec.num_commits)]
        return pa.concat_tables(parts) if parts else QUARANTINE_SCHEMA.empty_table()

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
    ) -> CodeBatches:
        """Batches of one epoch each time it is iterated: `{"top": uint16 [B, h, w], ..., "label": int64 [B]}`.

        Args:
            batch_size: rows of a batch on this rank.
            shuffle: another order every epoch, a function of (seed, epoch) alone.
            seed: names the order.
            rank: which of the `world_size` equal parts of each global batch is ours.
            world_size: how many ranks share an epoch.
            last: what is done with the ragged end: `keep` it (ranks may then differ by a batch), `drop` it, or `pad` it with
                rows from the beginning of the epoch's order so that all ranks get equally many full batches.
            levels: which levels to read; all by default.
            rows: only these rows (int64, distinct), for example one side of a split.

        Raises:
            CodesError: an option out of its range.
        """
        names = tuple(levels) if levels is not None else self.levels
        arrays = {name: self[name] for name in names}
        return CodeBatches(
            self.spec, arrays, self._labels, batch_size,
            shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, last=last, rows=rows,
        )  # fmt: skip

    def table(self, name: str, schema: pa.Schema, rows: int | None = None) -> pa.Table:
        """One Parquet part, with exactly these columns and (when given) so many rows.

        Raises:
            CodesError: the part cannot be read, or has other columns or another number of rows.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self.path / name, partitioning=None)  # pyright: ignore[reportUnknownMemberType]
        except (OSError, pa.ArrowException) as error:
            raise CodesError(f"{self.path / name}: cannot be read ({error}). See: vqmill verify {self.path}") from error
        if table.schema != schema or rows not in (None, table.num_rows):
            raise CodesError(
                f"{self.path / name}: {table.num_rows} rows of {', '.join(table.column_names)}; expected "
                f"{'rows' if rows is None else rows} of {', '.join(schema.names)}. See: vqmill verify {self.path}"
            )
        return table

    def _open(self, name: str, level: LevelSpec | None) -> LevelArray:
        spec = self.spec
        expected = layout.level_array(spec, level, spec.num_rows) if level else layout.label_array(spec, spec.num_rows)
        try:
            files = LocalStore(self.path, read_only=True)
            array = zarr.open_array(files, path=name, mode="r", zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
        except Exception as error:  # zarr has no common error for damaged metadata: also Type, Attribute, Recursion
            raise CodesError(
                f"{self.path}: array '{name}' cannot be opened ({error}). See: vqmill verify {self.path}"
            ) from error
        if not layout.same_layout(array, expected) or array.shape[0] < spec.num_rows:
            raise CodesError(
                f"{self.path}: array '{name}' ({array.dtype} {array.shape}) is not stored as zarr.json says: expected "
                f"{expected.dtype} {expected.shape} with the codecs of docs/format.md. Restore the store's metadata from a copy."
            )
        kind = f"level '{name}'" if level else f"array '{name}'"
        return LevelArray(array, spec.num_rows, f"{self.path}: {kind}", level.codebook_size if level else None)
