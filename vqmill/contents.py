"""Reads the files of one Zarr shard and says what is wrong with them.

Memory: one chunk or table at a time; for a store in a bucket, whose files are fetched once, the files of one Zarr shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqmill import layout
from vqmill.chunks import ChunkLayout
from vqmill.commits import Commit
from vqmill.errors import CodesError
from vqmill.places import Folder, Place, Readable, read_file
from vqmill.problems import Kind, Problem, runs, some, span
from vqmill.reader import ShardedArray
from vqmill.spec import CODECS, LevelSpec, StoreSpec
from vqmill.tables import MAX_PART_BYTES, MAX_PART_ROWS, QUARANTINE_SCHEMA, SAMPLES_SCHEMA, check_part
from vqmill.usage import StoreUsage

READ_BYTES = 4 * 1024 * 1024


@dataclass
class ShardFindings:
    """What reading one Zarr shard gave.

    Attributes:
        problems: in the order of its files.
        usage: how often each code occurs in chunks that are whole.
        bytes_read: size of the files that were read.
    """

    problems: list[Problem] = field(default_factory=list[Problem])
    usage: StoreUsage = field(default_factory=lambda: StoreUsage(()))
    bytes_read: int = 0


def check_sizes(store: Place, spec: StoreSpec, commit: Commit, listed: Mapping[str, int]) -> ShardFindings:
    """Whether the files of a commit are there with the recorded sizes; reads none.

    Args:
        store: where the store is.
        spec: its specification.
        commit: a record that agrees with it.
        listed: the sizes of all files of the store, bytes.
    """
    found = ShardFindings()
    for name, array in _files(spec, commit):
        # On a disk a listing does not tell files from pipes; in a bucket, each file asked for would be a request.
        size = _size(store, name) if isinstance(store, Folder) else listed.get(name, FileNotFoundError())
        if wrong := _wrong_size(size, commit.files[name]):
            kind = "reopened" if _may_be_reopened(spec, commit) and isinstance(size, int) else "damaged"
            found.problems.append(_problem(kind, name, wrong, commit, array))
    return found


def check_shard(place: Place, spec: StoreSpec, commit: Commit) -> ShardFindings:
    """Reads every byte of a commit's files, and looks at all they hold.

    Args:
        place: where the store is.
        spec: its specification.
        commit: a record that agrees with it.
    """
    store = place.fetched()
    found = ShardFindings(usage=StoreUsage(spec.levels))
    levels = {level.name: level for level in spec.levels}
    whole: set[str] = set()
    labels: np.ndarray[Any, Any] | None = None
    for name, array in _files(spec, commit):
        facts = commit.files[name]
        size = _size(store, name)
        wrong = _wrong_size(size, facts)
        if not isinstance(size, int):
            found.problems.append(_problem("damaged", name, wrong or "", commit, array))
            continue
        wrong = wrong or _other_bytes(store, name, facts)
        found.bytes_read += size
        broken: list[tuple[str, tuple[int, int]]] = []
        if array is not None and array in levels:
            broken = _broken_codes(store, spec, levels[array], commit, found.usage)
        elif array is not None:
            labels, broken = _labels(store, spec, commit)
        if wrong:
            labels = None if array == layout.LABEL else labels
            good = not broken and (array is not None or _is_table(store, name))
            places = "; ".join(text for text, _ in broken) or ("all its chunks can be decoded" if array else "")
            kind = "reopened" if good and _may_be_reopened(spec, commit) else "damaged"
            text = f"{wrong}; {places}".removesuffix("; ")
            found.problems.append(_problem(kind, name, text, commit, array, _around(broken)))
            continue
        whole.add(name)
        found.problems += [_problem("content", name, text, commit, array, rows) for text, rows in broken]
    samples, more = _samples(store, commit, labels) if layout.samples_file(commit.shard) in whole else (None, [])
    found.problems += more
    if layout.quarantine_file(commit.shard) in whole:
        found.problems += _quarantine(store, commit)
    if samples is not None and found.problems:
        sources = tuple(dict.fromkeys(samples["source"].to_pylist()))
        found.problems = [replace(problem, sources=sources) for problem in found.problems]
    return found


def _may_be_reopened(spec: StoreSpec, commit: Commit) -> bool:
    """Whether a growing store may have written the files of this commit anew: the last one's, when it is not full."""
    return not spec.complete and commit.shard == spec.num_commits - 1 and commit.rows < spec.rows_per_shard


def _files(spec: StoreSpec, commit: Commit) -> Iterator[tuple[str, str | None]]:
    """Each file of a commit, and the array that it is a Zarr shard of; None for a table."""
    arrays = {layout.shard_file(level.name, commit.shard, len(level.grid)): level.name for level in spec.levels}
    arrays[layout.shard_file(layout.LABEL, commit.shard, 0)] = layout.LABEL
    for name in layout.shard_files(spec, commit.shard, commit.rows):
        yield name, arrays.get(name)


def _problem(
    kind: Kind, name: str, wrong: str, commit: Commit, array: str | None, rows: tuple[int, int] | None = None
) -> Problem:
    everything = (commit.first_row, commit.first_row + commit.rows - 1) if commit.rows else None
    return Problem(kind, name, wrong, array, (commit.shard, commit.shard), rows or everything)


def _size(store: Readable, name: str) -> int | Exception:
    """A file's size in bytes, or why it has none."""
    try:
        return store.open(name).size
    except (OSError, CodesError) as error:
        return error


def _wrong_size(size: int | Exception, facts: Mapping[str, Any]) -> str | None:
    match size:
        case int():
            return (
                None if size == facts["bytes"] else f"damaged: {size:,} bytes, the commit record says {facts['bytes']}"
            )
        case FileNotFoundError():
            return "missing"
        case OSError():
            return f"cannot be read: {_reason_of(size)}"
        case _:
            return str(size)


def _other_bytes(store: Readable, name: str, facts: Mapping[str, Any]) -> str | None:
    digest, buffer, start = hashlib.sha256(), np.empty(READ_BYTES, np.uint8), 0
    try:
        file = store.open(name)
        while count := file.read_into(start, buffer[: max(0, file.size - start)]):
            digest.update(buffer[:count].data)
            start += count
    except OSError as error:
        return f"cannot be read: {_reason_of(error)}"
    return None if digest.hexdigest() == facts.get("sha256") else "damaged: its SHA-256 is not the recorded one"


def _reason_of(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _around(broken: list[tuple[str, tuple[int, int]]]) -> tuple[int, int] | None:
    return (min(rows[0] for _, rows in broken), max(rows[1] for _, rows in broken)) if broken else None


def _broken_codes(
    store: Readable, spec: StoreSpec, level: LevelSpec, commit: Commit, usage: StoreUsage
) -> list[tuple[str, tuple[int, int]]]:
    """What is wrong with the chunks of a level's Zarr shard, and in which rows; counts the codes of the others."""
    chunk_rows = level.rows_per_chunk(spec.rows_per_shard)
    chunks = ChunkLayout(
        (chunk_rows, *level.grid), level.dtype, spec.rows_per_shard // chunk_rows, _compressor(spec.codec)
    )
    array = ShardedArray(store, lambda shard: layout.shard_file(level.name, shard, len(level.grid)), chunks)
    out = np.empty(chunks.chunk_shape, chunks.dtype)
    reasons: dict[int, str] = {}
    beyond: list[tuple[int, int]] = []  # row, code
    for inner in range(-(-commit.rows // chunk_rows)):
        first = inner * chunk_rows
        try:
            array.read_chunk(commit.shard * chunks.chunks_per_shard + inner, out)
        except CodesError as error:
            reasons[inner] = _reason(error)
            continue
        codes = out[: commit.rows - first]
        largest = codes.reshape(len(codes), -1).max(1)
        bad = np.flatnonzero(largest >= level.codebook_size)
        beyond += [(commit.first_row + first + int(row), int(largest[row])) for row in bad]
        if not len(bad):
            usage.add(level.name, codes)
    broken = _undecodable(reasons, chunk_rows, commit)
    if beyond:
        row, code = beyond[0]
        size = level.codebook_size
        text = f"holds code {code} at row {row:,}, but codebook_size is {size} (valid 0..{size - 1})"
        text += f"; {len(beyond):,} rows hold such codes" if len(beyond) > 1 else ""
        broken.append((text, (row, beyond[-1][0])))
    return broken


def _compressor(codec: str | None) -> str:
    return "zstd" if codec == "zstd" else "blosc"


def _reason(error: CodesError) -> str:
    """What a reader says of a chunk, without the place, which is said already."""
    return str(error).split(": ", 1)[-1]


def _undecodable(reasons: dict[int, str], chunk_rows: int, commit: Commit) -> list[tuple[str, tuple[int, int]]]:
    """The chunks that could not be decoded, as one sentence: where they are, and why the first of them."""
    if not reasons:
        return []
    places = [
        (
            chunks,
            (
                commit.first_row + chunks[0] * chunk_rows,
                commit.first_row + min(commit.rows, (chunks[1] + 1) * chunk_rows) - 1,
            ),
        )
        for chunks in runs(reasons)
    ]
    named = some([f"{span('chunk', chunks)} ({span('row', rows)})" for chunks, rows in places])
    why = next(iter(reasons.values()))
    return [(f"{named} cannot be decoded: {why}", (places[0][1][0], places[-1][1][1]))]


def _labels(
    store: Readable, spec: StoreSpec, commit: Commit
) -> tuple[np.ndarray[Any, Any] | None, list[tuple[str, tuple[int, int]]]]:
    """The labels of a Zarr shard, int64 [n], or what is wrong with them."""
    chunks = ChunkLayout((spec.rows_per_shard,), np.dtype(np.int64), 1, _compressor(CODECS[0]))
    out = np.empty(chunks.chunk_shape, chunks.dtype)
    try:
        ShardedArray(store, lambda shard: layout.shard_file(layout.LABEL, shard, 0), chunks).read_chunk(
            commit.shard, out
        )
    except CodesError as error:
        return None, _undecodable({0: _reason(error)}, spec.rows_per_shard, commit)
    return out[: commit.rows], []


def _samples(
    store: Readable, commit: Commit, labels: np.ndarray[Any, Any] | None
) -> tuple[pa.Table | None, list[Problem]]:
    name = layout.samples_file(commit.shard)
    try:
        table = _table(store, name, SAMPLES_SCHEMA, commit.rows)
    except CodesError as error:
        return None, [_problem("content", name, str(error), commit, None)]
    if labels is not None and not np.array_equal(wanted := layout.label_column(table), labels):
        rows = commit.first_row + np.flatnonzero(wanted != labels)
        text = f"differs from the samples table in {len(rows):,} rows"
        label_file = layout.shard_file(layout.LABEL, commit.shard, 0)
        return table, [_problem("content", label_file, text, commit, layout.LABEL, (int(rows[0]), int(rows[-1])))]
    return table, []


def _quarantine(store: Readable, commit: Commit) -> Iterator[Problem]:
    name = layout.quarantine_file(commit.shard)
    try:
        lines = _table(store, name, QUARANTINE_SCHEMA).num_rows
    except CodesError as error:
        yield _problem("content", name, str(error), commit, None)
        return
    if lines < commit.counts.quarantined:  # more is fine: a sample may be encoded and leave a warning
        text = f"{lines:,} rows, the commit record says {commit.counts.quarantined:,}"
        yield _problem("content", name, text, commit, None)


def _is_table(store: Readable, name: str) -> bool:
    schema = SAMPLES_SCHEMA if name.startswith("samples/") else QUARANTINE_SCHEMA
    try:
        _table(store, name, schema)
    except CodesError:
        return False
    return True


def _table(store: Readable, name: str, schema: pa.Schema, rows: int | None = None) -> pa.Table:
    """One Parquet part; its columns and rows are compared before any of them is read.

    Raises:
        CodesError: it cannot be read, or has other columns or another number of rows.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(read_file(store, name, MAX_PART_BYTES))) as file:  # pyright: ignore[reportUnknownMemberType]
            count = file.metadata.num_rows
            if file.schema_arrow != schema or rows not in (None, count):
                expected = f"{'rows' if rows is None else f'{rows:,} rows'} of {', '.join(schema.names)}"
                raise CodesError(
                    f"holds {count:,} rows of {some(file.schema_arrow.names) or 'nothing'}, expected {expected}"
                )
            check_part(file, rows if rows is not None else MAX_PART_ROWS)
            return file.read()  # pyright: ignore[reportUnknownMemberType]
    except (OSError, pa.ArrowException) as error:
        raise CodesError(f"cannot be read ({error})") from error
