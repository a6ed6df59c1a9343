"""Samples that were set aside and tried again later: each must be in the store once, as a row or as its newest quarantine line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vqmill.store import Codes

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE = ("input_shard", "index", "source", "key")  # what tells the samples of a corpus apart

Hashes = np.ndarray[Any, np.dtype[np.int64]]


def hash_samples(table: pa.Table) -> Hashes:
    """int64 [n], a hash of each line's sample, comparable in this process only."""
    columns = [table[name].to_pylist() for name in SAMPLE]
    return np.fromiter(map(hash, zip(*columns, strict=True)), np.int64, table.num_rows)


def hash_rows(codes: Codes) -> Hashes:
    """int64 [samples], a hash of each sample that has rows; several rows of one sample lie one behind the other."""
    parts = [np.empty(0, np.int64)]
    for first in range(0, len(codes), codes.spec.rows_per_shard):
        parts.append(hash_samples(codes.samples(first, min(len(codes), first + codes.spec.rows_per_shard))))
    rows = np.concatenate(parts)
    return rows[np.diff(rows, prepend=~rows[:1]) != 0]


def retry_problems(codes: Codes) -> Iterator[str]:
    """What is wrong with the retries of a finished store; nothing in one without them.

    Raises:
        CodesError: a part of its tables is damaged.
    """
    again = sum(segment.retries for segment in codes.spec.segments)
    if not again:
        return
    lines = hash_samples(codes.quarantine(history=True))
    if again > len(lines):
        yield f"its segments try {again:,} quarantined samples again, but only {len(lines):,} were set aside"
        return
    samples, times = np.unique(np.concatenate([hash_rows(codes), lines[again:]]), return_counts=True)
    if twice := int((times > 1).sum()):
        yield f"{twice:,} samples are in it more than once, as rows or as quarantine lines that count"
    if lost := int((~np.isin(lines[:again], samples)).sum()):
        yield f"{lost:,} samples that were to be tried again have neither a row nor a newer quarantine line"
