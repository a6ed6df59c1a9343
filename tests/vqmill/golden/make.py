"""Writes the golden stores of the present format version. Run once for each version, by hand, and commit what it wrote:

    python tests/vqmill/golden/make.py

Stores of released versions are never written again: that they can be read for ever is what they are for.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from contents import GOLDEN, INPUT_SHARD_ROWS, Golden, bad_sample, codes, sample

from vqmill.spec import FORMAT_VERSION
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard


def write(place: Path, golden: Golden) -> None:
    """Writes one store, in Zarr shards as `vqmill tokenize` would cut them: each input shard is one span."""
    spec = golden.spec
    values = {level.name: codes(level, golden.num_rows) for level in spec.levels}
    with StoreWriter(place, spec) as writer:
        for shard, first in enumerate(range(0, golden.num_rows, spec.rows_per_shard)):
            stop = min(golden.num_rows, first + spec.rows_per_shard)
            ended = range(first // INPUT_SHARD_ROWS, stop // INPUT_SHARD_ROWS)  # input shards whose span ends here
            samples = pa.Table.from_pylist([sample(row) for row in range(first, stop)], schema=SAMPLES_SCHEMA)
            quarantine = pa.Table.from_pylist([bad_sample(number) for number in ended], schema=QUARANTINE_SCHEMA)
            levels = {name: array[first:stop] for name, array in values.items()}
            files = write_shard(place, spec, shard, levels, samples, quarantine)
            counts = Counts(encoded=INPUT_SHARD_ROWS * len(ended), quarantined=len(ended))
            writer.commit(stop - first, Cursor(stop // INPUT_SHARD_ROWS, 0, stop % INPUT_SHARD_ROWS), counts, files)
        writer.finish()


if __name__ == "__main__":
    folder = Path(__file__).parent / f"v{FORMAT_VERSION}"
    for name, golden in GOLDEN.items():
        write(folder / f"{name}.zarr", golden)
        (folder / f".{name}.zarr.lock").unlink()
