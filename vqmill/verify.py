"""Reads every byte of a store and says what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vqmill import layout
from vqmill.errors import CodesError
from vqmill.spec import StoreSpec
from vqmill.store import Codes
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Commit, Counts, committed_files, files_of


@dataclass(frozen=True)
class Verification:
    """What `verify_store` found.

    Attributes:
        rows: code rows that the store counts.
        counts: input samples over all commits.
        bytes_read: size of all files read.
        used_codes: by level, how many of the K codes occur.
        perplexity: by level, 2 to the entropy (bits) of the codes over the whole store.
        problems: one sentence each; empty when all is well.
    """

    rows: int
    counts: Counts
    bytes_read: int
    used_codes: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def verify_store(path: Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Checks commits, checksums, tables and code ranges of a whole store.

    Args:
        path: the store's folder.
        progress: called with (Zarr shards done, Zarr shards in all).

    Raises:
        CodesError: not a store at all, or one that cannot be opened.
    """
    codes = Codes(path, layout.read_spec(path))
    spec = codes.spec
    problems = (
        [] if spec.complete else [f"{path}: unfinished: run the same `vqmill tokenize` command again to finish it."]
    )
    histograms = {level.name: np.zeros(level.codebook_size, np.int64) for level in spec.levels}
    commits: list[Commit] = []
    total = Counts()
    first_row = bytes_read = 0
    for shard in range(spec.num_commits):
        try:
            commit = Commit.read(path / layout.commit_file(shard))
        except CodesError as error:
            problems.append(str(error))
            break
        if (commit.shard, commit.first_row) != (shard, first_row):
            problems.append(
                f"{layout.commit_file(shard)}: says shard {commit.shard} from row {commit.first_row}, expected {shard} from row {first_row}."
            )
        damaged = [*_wrong_files(spec, commit), *_damaged_files(path, spec, commit)]
        problems += damaged
        if not damaged:
            problems += _content_problems(codes, commit, histograms)
        commits.append(commit)
        total = total + commit.counts
        first_row += commit.rows
        bytes_read += sum(int(facts.get("bytes", 0)) for facts in commit.files.values())
        if progress:
            progress(shard + 1, spec.num_commits)
    if first_row != spec.num_rows:
        problems.append(f"zarr.json counts {spec.num_rows} rows, the commit records {first_row}.")
    if len(commits) == spec.num_commits:
        known = set(committed_files(spec, commits))
        strays = [name for file in files_of(path) if (name := file.relative_to(path).as_posix()) not in known]
        problems += [
            f"{name}: belongs to no commit (left by a killed job). Running the job again removes it." for name in strays
        ]
        metadata = {**layout.array_metadata(spec), "zarr.json": layout.group_metadata(spec)}
        problems += [
            f"{name}: not what this store's metadata should be. Restore it from a copy."
            for name, expected in metadata.items()
            if json.loads((path / name).read_bytes()) != json.loads(expected)
        ]
    used = {name: int(np.count_nonzero(histogram)) for name, histogram in histograms.items()}
    spread = {name: perplexity(histogram) for name, histogram in histograms.items()}
    return Verification(spec.num_rows, total, bytes_read, used, spread, tuple(problems))


def perplexity(histogram: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    """2 to the entropy of a histogram of codes: how many codes would carry as much, were all used equally. 0 when it is empty.

    >>> perplexity(np.array([5, 5, 0]))
    2.0
    """
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    share = histogram[histogram > 0] / total
    return float(2.0 ** -(share * np.log2(share)).sum())


def _wrong_files(spec: StoreSpec, commit: Commit) -> Iterator[str]:
    expected = layout.shard_files(spec, commit.shard, commit.rows)
    for name in sorted(set(expected) ^ set(commit.files)):
        yield f"{layout.commit_file(commit.shard)}: {'leaves out' if name in expected else 'lists'} {name}."


def _damaged_files(store: Path, spec: StoreSpec, commit: Commit) -> Iterator[str]:
    rows = f"rows {commit.first_row}..{commit.first_row + commit.rows - 1}" if commit.rows else "no rows"
    where = f"Zarr shard {commit.shard}, {rows}, from input shard {commit.cursor.input_shard} or before"
    for name in layout.shard_files(spec, commit.shard, commit.rows):
        facts = commit.files.get(name)
        if facts is None:
            continue
        try:
            size = (store / name).stat().st_size
            with (store / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            yield f"{name}: {error.strerror} ({where}). Restore it from a copy, or tokenize again."
            continue
        if (found, size) != (facts.get("sha256"), facts.get("bytes")):
            yield f"{name}: damaged: its size or SHA-256 is not the committed one ({where}). Restore it from a copy, or tokenize again."


def _content_problems(
    codes: Codes, commit: Commit, histograms: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]]
) -> Iterator[str]:
    stop = commit.first_row + commit.rows
    try:
        samples = codes.table(layout.samples_file(commit.shard), SAMPLES_SCHEMA, commit.rows)
        if not np.array_equal(layout.label_column(samples), codes.label_array[commit.first_row : stop]):
            yield f"array 'label', Zarr shard {commit.shard}: differs from the samples table."
    except CodesError as error:
        yield f"Zarr shard {commit.shard}: {error}"
    try:
        lines = codes.table(layout.quarantine_file(commit.shard), QUARANTINE_SCHEMA).num_rows
        if lines < commit.counts.quarantined:  # more is fine: a sample may be encoded and leave a warning
            yield f"{layout.quarantine_file(commit.shard)}: {lines} rows, the commit record says {commit.counts.quarantined}."
    except CodesError as error:
        yield f"Zarr shard {commit.shard}: {error}"
    for level in codes.spec.levels if commit.rows else ():
        try:
            rows = codes[level.name][commit.first_row : stop]
        except CodesError as error:
            yield f"Zarr shard {commit.shard}: {error}"
            continue
        histograms[level.name] += np.bincount(rows.reshape(-1), minlength=level.codebook_size)
    if commit.counts.encoded > commit.rows and not commit.rows:
        yield f"{layout.commit_file(commit.shard)}: {commit.counts.encoded} samples encoded into no rows."
