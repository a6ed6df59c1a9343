"""Columns of the samples and quarantine tables (docs/format.md)."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from vqmill.errors import CodesError

MAX_PART_BYTES = 2 * 1024 * 1024 * 1024  # of a Parquet part, encoded or decoded
MAX_PART_ROWS = 2**24  # a Zarr shard may be followed by many bad samples


def check_part(part: pq.ParquetFile, max_rows: int) -> None:
    """Refuses a Parquet part that claims more than a part holds, before its columns are read.

    Raises:
        CodesError: more rows, or more bytes.
    """
    facts = part.metadata
    size = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
    if facts.num_rows > max_rows or size > MAX_PART_BYTES:
        raise CodesError(
            f"{facts.num_rows:,} rows and {size:,} bytes; a part has at most {max_rows:,} rows and {MAX_PART_BYTES:,} bytes"
        )


SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_shard", pa.int64(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("caption", pa.string()),
        pa.field("json", pa.string()),
        pa.field("width", pa.int64(), nullable=False),
        pa.field("height", pa.int64(), nullable=False),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_shard", pa.int64(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
