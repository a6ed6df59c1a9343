"""Code stores to measure on: codes with the statistics of a trained tokenizer's, and stores written as our commands write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from vqmill.spec import LevelSpec, Segment, StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard

Array = np.ndarray[Any, np.dtype[Any]]
Address = TypeVar("Address", Path, str)

ROWS = 131_072
ROWS_PER_SHARD = 4096
LEVEL = LevelSpec("codes", 512, (32, 32))  # 2 KiB a row, so that ROWS are 256 MiB
SPREAD = math.sqrt(2 * math.log(2) * 0.6)  # of log usage: 0.6 bit under the 9 bits of equal usage


def usage(codebook_size: int) -> Array:
    """How often each code is used: log-normal, the most frequent first, as trained codebooks are; float64 [K], sums to 1.

    With 512 codes its entropy is 8.4 bits.
    """
    places = [NormalDist().inv_cdf((rank + 0.5) / codebook_size) for rank in range(codebook_size)]
    weights = np.exp(-SPREAD * np.array(places))
    return weights / weights.sum()


def draw_codes(num_rows: int, level: LevelSpec = LEVEL, seed: int = 0) -> Array:
    """Independent codes of that usage: [num_rows, *grid] in the level's dtype."""
    bounds = np.round(np.cumsum(usage(level.codebook_size)) * 65_536).astype(np.int64)
    code_of = np.searchsorted(bounds, np.arange(65_536), side="right").astype(level.dtype)
    drawn = np.random.default_rng(seed).integers(0, 65_536, (num_rows, *level.grid), dtype=np.uint16)
    return code_of[drawn]


def entropy(counts: Array) -> float:
    """Order-0 entropy of codes with these counts, in bits a code."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def store_spec(levels: tuple[LevelSpec, ...] = (LEVEL,), codec: str = "blosc-zstd") -> StoreSpec:
    """The specification of a store that no corpus made."""
    return StoreSpec(levels, ROWS_PER_SHARD, {"fingerprint": "none"}, segments=(Segment("none"),), codec=codec)


def write_store(path: Address, spec: StoreSpec, codes: Mapping[str, Array], labels: Array | None = None) -> Address:
    """Writes a whole store.

    Args:
        path: the store's folder or address.
        spec: levels, rows of a Zarr shard, codec.
        codes: by level, integers [n, *grid].
        labels: int64 [n]; the row's number where None.
    """
    num_rows = len(next(iter(codes.values())))
    labels = np.arange(num_rows) if labels is None else labels
    with StoreWriter(path, spec) as writer:
        for shard, first in enumerate(range(0, num_rows, spec.rows_per_shard)):
            stop = min(num_rows, first + spec.rows_per_shard)
            rows = {name: values[first:stop] for name, values in codes.items()}
            samples = _samples(first, labels[first:stop])
            files = write_shard(path, writer.spec, shard, rows, samples, QUARANTINE_SCHEMA.empty_table())
            writer.commit(stop - first, Cursor(0, 0, stop), Counts(stop - first), files)
        writer.finish()
    return path


def _samples(first: int, labels: Array) -> pa.Table:
    numbers = np.arange(first, first + len(labels))
    ones = np.ones_like(numbers)
    columns = {
        "key": numbers.astype(str), "source": np.full(len(labels), "none"), "input_shard": 0 * ones, "index": numbers,
        "label": labels, "width": ones, "height": ones,
    }  # fmt: skip
    given = {name: pa.array(values) for name, values in columns.items()}
    nothing = pa.nulls(len(labels), pa.string())
    return pa.table([given.get(name, nothing) for name in SAMPLES_SCHEMA.names], schema=SAMPLES_SCHEMA)
