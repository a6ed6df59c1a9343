"""Spans that no encoder made."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipelines.corpus.plan import InputShard
from pipelines.encoder import SPAN_SAMPLES, Span
from vqmill.spec import StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA


def span_of(spec: StoreSpec, shard: InputShard, index: int, codes: dict[str, Any]) -> Span:
    """A span of an input shard, with so many of the given codes as it has samples: integers [SPAN_SAMPLES, *grid] by level."""
    first = index * SPAN_SAMPLES
    number = min(SPAN_SAMPLES, shard.num_samples - first)
    columns: dict[str, list[Any]] = {
        "key": [f"{shard.index:06d}-{row:04d}" for row in range(first, first + number)],
        "source": [shard.name] * number,
        "input_shard": [shard.index] * number,
        "index": list(range(first, first + number)),
        "label": [row % 10 for row in range(number)],
        "caption": [None] * number,
        "json": [None] * number,
        "width": [500] * number,
        "height": [375] * number,
    }
    rows = {level.name: codes[level.name][:number] for level in spec.levels}
    return Span(index, rows, pa.table(columns, schema=SAMPLES_SCHEMA), QUARANTINE_SCHEMA.empty_table())
