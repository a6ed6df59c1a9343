"""Single rows of a code store, against zarr-python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr

import vqmill
from benchmarks.measure import Line, compare
from benchmarks.stores import draw_codes, store_spec, write_store

ROWS = 32_768
LOOKUPS = 200


def rows(folder: Path) -> Iterator[Line]:
    """Rows at random, one by one, against zarr-python on the same files."""
    path = write_store(folder / "codes.zarr", store_spec(), {"codes": draw_codes(ROWS)})
    level = vqmill.open_codes(path)["codes"]
    array = zarr.open_array(path / "codes", mode="r")
    wanted = np.random.default_rng(0).integers(0, ROWS, LOOKUPS).tolist()
    for row in wanted[:10]:
        assert np.array_equal(level[row], np.asarray(array[row]))

    def ours() -> None:
        for row in wanted:
            level[row]

    def peer() -> None:
        for row in wanted:
            array[row]

    yield compare(f"{LOOKUPS} random rows of {ROWS:,}, one by one, against zarr-python", ours, peer, 20.0)
