"""Writes a store of many small Zarr shards, or goes on with it: `writer_main.py STORE`. To be killed."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa

from vqmill.spec import LevelSpec, StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard

SHARDS, ROWS = 80, 8
SPEC = StoreSpec(
    (LevelSpec("top", 300, (2, 2)), LevelSpec("bottom", 200, (4, 4))), ROWS, {"fingerprint": "f"}, codec="zstd"
)


def write(store: str) -> None:
    with StoreWriter(store, SPEC) as writer:
        for shard in range(writer.cursor.input_shard, SHARDS):
            random = np.random.default_rng(shard)
            codes = {level.name: random.integers(0, level.codebook_size, (ROWS, *level.grid)) for level in SPEC.levels}
            rows = [
                {
                    "key": f"{row}",
                    "source": "-",
                    "input_shard": shard,
                    "index": row,
                    "label": row,
                    "width": 4,
                    "height": 4,
                }
                for row in range(ROWS)
            ]
            samples = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)
            files = write_shard(store, SPEC, shard, codes, samples, QUARANTINE_SCHEMA.empty_table())
            writer.commit(ROWS, Cursor(shard + 1), Counts(ROWS), files)
        writer.finish()


if __name__ == "__main__":
    write(sys.argv[1])
