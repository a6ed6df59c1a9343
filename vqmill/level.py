"""An array of a store as users index it: `codes["bottom"][0:8]`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from vqmill.errors import CodesError
from vqmill.reader import CACHE_BYTES, ChunkSource, RowReader
from vqmill.spec import LABEL_FILL


@dataclass(frozen=True)
class ValueCheck:
    """Refuses values that cannot be: codes from K on, or labels that were never written."""

    name: str
    codebook_size: int | None  # None: labels

    def __call__(self, values: np.ndarray[Any, Any], first_row: int) -> None:
        """Looks at rows first_row and on.

        Raises:
            CodesError: naming the rows.
        """
        if self.codebook_size is None:
            if int(values.min()) == LABEL_FILL:
                raise CodesError(
                    f"{self.name}: labels are missing in {self._rows(values, first_row)}. Restore its files from a copy."
                )
        elif (high := int(values.max())) >= self.codebook_size:
            raise CodesError(
                f"{self.name} holds code {high} in {self._rows(values, first_row)}, but codebook_size is {self.codebook_size} "
                f"(valid 0..{self.codebook_size - 1}). Restore it from a copy."
            )

    def _rows(self, values: np.ndarray[Any, Any], first_row: int) -> str:
        return f"rows {first_row}..{first_row + len(values) - 1}"


class LevelArray:
    """The codes of one level: an array [N, *grid] of unsigned integers that reads what is indexed.

    >>> codes["bottom"][0:8].shape          # doctest: +SKIP
    (8, 64, 64)
    """

    def __init__(self, source: ChunkSource, num_rows: int, name: str, codebook_size: int | None) -> None:
        self._source = source
        self._num_rows = num_rows
        self._name = name  # for errors: the store and the array in it
        self._check = ValueCheck(name, codebook_size)
        self._reader = self.row_reader(CACHE_BYTES)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, h, w) or (N, t, h, w)."""
        return (self._num_rows, *self._source.chunk_shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype: uint8, uint16 or uint32."""
        return self._source.dtype

    @property
    def chunk_rows(self) -> int:
        """Rows that are stored, and decoded, together."""
        return self._source.chunk_shape[0]

    def row_reader(self, cache_bytes: int) -> RowReader:
        """Reads rows into memory that is there already: for loaders. It keeps so many bytes of decoded chunks."""
        return RowReader(self._source, self._check, self._name, cache_bytes, below=self._check.codebook_size or 0)

    def __getitem__(self, key: Any) -> np.ndarray[Any, Any]:
        """Rows by integer, slice, list of integers or boolean mask; then what else is named, as numpy indexes the rows that were read.

        Raises:
            IndexError: a row that is not there.
            CodesError: the files are damaged.
        """
        parts = cast("tuple[Any, ...]", key if isinstance(key, tuple) and key else (key,))
        if parts[0] is Ellipsis:
            parts = (*[slice(None)] * (len(self.shape) - len(parts) + 1), *parts[1:]) or (slice(None),)
        rows, rest = parts[0], parts[1:]
        if len(parts) > len(self.shape):
            raise IndexError(f"{len(parts)} axes are named, {self._name} has {len(self.shape)}")
        if isinstance(rows, (int, np.integer)) and not isinstance(rows, bool):
            return np.asarray(self._row(operator.index(cast("int", rows)))[(0, *rest)])
        if isinstance(rows, slice):
            first, stop, step = rows.indices(self._num_rows)
            chosen = np.arange(first, stop, step)
        else:
            chosen = self._listed(rows)
        found = self._read(chosen)
        return found[(slice(None), *rest)] if rest else found

    def _listed(self, rows: Any) -> np.ndarray[Any, Any]:
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iub"):
            raise IndexError(f"rows are named by integer, slice, list of integers or mask, got {rows!r}")
        if wanted.dtype == bool:
            if wanted.shape != (self._num_rows,):
                raise IndexError(f"a mask over {self._num_rows} rows is expected, got shape {wanted.shape}")
            return np.flatnonzero(wanted)
        if wanted.dtype.kind == "u" and wanted.size and wanted.max() >= self._num_rows:
            raise IndexError(f"row {wanted.max()} is not in 0..{self._num_rows - 1}")
        return self._checked(wanted.astype(np.int64))

    def _row(self, row: int) -> np.ndarray[Any, Any]:
        """The same as `_read` of this row, with fewer steps: many read row by row."""
        if not -self._num_rows <= row < self._num_rows:
            raise self._no_row(row)
        values = np.empty((1, *self.shape[1:]), self.dtype)
        self._reader.read_row(row % self._num_rows, values)
        return values

    def _read(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        ascending = bool((rows[1:] > rows[:-1]).all())
        distinct, places = (rows, None) if ascending else np.unique(rows, return_inverse=True)
        values = np.empty((len(distinct), *self.shape[1:]), self.dtype)
        self._reader.read(distinct, values)
        return values if places is None else values[places]

    def _checked(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if rows.size and (rows.min() < -self._num_rows or rows.max() >= self._num_rows):
            raise self._no_row(int(rows.max() if rows.max() >= self._num_rows else rows.min()))
        return np.where(rows < 0, rows + self._num_rows, rows)

    def _no_row(self, row: int) -> IndexError:
        return IndexError(f"row {row} is not in 0..{self._num_rows - 1}")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError(
                f"{self._name} is on a disk: it becomes an array only by being copied, so copy=False cannot be had."
            )
        return np.asarray(self[:], dtype=dtype)
