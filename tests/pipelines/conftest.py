"""Small stores to be copied, and what copies are made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest


def renamed(stores: Any, prefix: str, rows_of_a_sample: int) -> Any:
    """A builder whose sample keys begin otherwise, and whose samples may have several rows, as clips of a video have."""

    class Renamed(type(stores)):
        @staticmethod
        def samples(labels: list[int | None], first: int = 0) -> pa.Table:
            rows = stores.samples(labels, first).to_pylist()
            for row in rows:
                row["index"] //= rows_of_a_sample
                row["key"] = f"{prefix}-{row['index']}"
            return pa.Table.from_pylist(rows, schema=stores.samples([]).schema)

    return Renamed()


@pytest.fixture(scope="session")
def make_store(stores: Any) -> Callable[..., Path]:
    """Makes a finished store with labels 0, 1, 2, none, 0, 1, ... and one quarantined sample for each Zarr shard."""

    def make(
        path: Path, num_rows: int, *, spec: Any = None, seed: int = 0, prefix: str | None = None, unlabelled: bool = False,
        rows_of_a_sample: int = 1,
    ) -> Path:  # fmt: skip
        spec = spec or stores.two_levels
        labels = [None if unlabelled or row % 4 == 3 else row % 4 for row in range(num_rows)]
        builder = renamed(stores, prefix or path.stem, rows_of_a_sample)
        return builder.write(path, spec, stores.codes(spec, num_rows, seed), labels)

    return make


@pytest.fixture
def pair(make_store: Callable[..., Path], tmp_path: Path, no_fsync: None) -> tuple[Path, Path]:
    """Two stores of 21 and 30 rows in Zarr shards of 8, with different keys."""
    return make_store(tmp_path / "a.zarr", 21, seed=1), make_store(tmp_path / "b.zarr", 30, seed=2)
