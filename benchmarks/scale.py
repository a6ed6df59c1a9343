"""What does not depend on how large a store is: opening it, beginning and resuming an epoch, reading a row.

The stores claim 10^5, 10^7 and 10^9 rows of [32, 32] uint16, in Zarr shards of 4,096 rows, as ours have by default (2 TB of raw codes). They
are sparse in this sense: every Zarr shard is there under its name, but all are hard links to a few files with the same rows. So their
number, their names, the chunks to be put in order and the work of reading one are those of a real store; only the disk space is not.
Commit records and tables of samples are left out: neither opening nor loading reads them. Of the smallest store, half an epoch is less than a
default pool, so that a loader resumed there has less to read; compare 10^7 with 10^9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import vqmill
from benchmarks.measure import Line, medians, speed
from benchmarks.peers import BATCH
from benchmarks.stores import ROWS_PER_SHARD, draw_codes, store_spec
from vqmill import layout
from vqmill.loader import CodeBatches
from vqmill.spec import LevelSpec

SIZES = (10**5, 10**7, 10**9)
FLAT = LevelSpec("codes", 512, (1024,))  # the bytes of [32, 32], but one folder fewer for each Zarr shard
MAX_LINKS = 60_000  # names of one file; ext4 allows 65,000
NAMES = 1_000_000  # files and folders of all stores together, and some to spare
REPEATS = 3
RANDOM_ROWS = 64


def scale(folder: Path) -> Iterator[Line]:
    """Opening, the first batch, resuming in mid-epoch, and random rows: 10^7 and 10^9 rows against 10^5."""
    small = SIZES[0]
    with TemporaryDirectory(prefix="benchmarks-", dir=_place_for_many_files(folder)) as name:
        stores = {rows: sparse_store(Path(name) / f"{rows}.zarr", rows) for rows in SIZES}
        for title, make in _works().items():
            found = medians({str(rows): make(path) for rows, path in stores.items()}, REPEATS)
            for rows in SIZES[1:]:
                yield speed(f"{title}, a store of {rows:,} rows against {small:,}", found[str(rows)], found[str(small)])


def _place_for_many_files(folder: Path) -> Path:
    """A file system in memory where there is one with room: half a million names take minutes to remove from a disk."""
    memory = Path("/dev/shm")  # noqa: S108 - a fresh folder with a name of its own is made in it
    roomy = os.access(memory, os.W_OK) and os.statvfs(memory).f_favail > NAMES
    return memory if roomy else folder


def _works() -> dict[str, Callable[[Path], Callable[[], object]]]:
    """What is timed on a store, by its title."""

    def batches(path: Path) -> CodeBatches:
        return vqmill.open_codes(path).batches(BATCH, shuffle=True)

    def resumed(path: Path) -> Callable[[], object]:
        loader = batches(path)
        state = loader.state_dict() | {"place": len(loader) // 2 * BATCH}

        def run() -> object:
            again = batches(path)
            again.load_state_dict(state)
            return next(iter(again))

        return run

    def random_rows(path: Path) -> Callable[[], object]:
        codes = vqmill.open_codes(path)
        generator = np.random.default_rng(0)
        return lambda: [codes["codes"][int(row)] for row in generator.integers(0, len(codes), RANDOM_ROWS)]

    return {
        "opening": lambda path: lambda: vqmill.open_codes(path),
        "opening, planning an epoch and its first batch": lambda path: lambda: next(iter(batches(path))),
        "opening, resuming in mid-epoch and the next batch": resumed,
        f"{RANDOM_ROWS} random rows": random_rows,
    }


def sparse_store(path: Path, num_rows: int) -> Path:
    """A finished store that claims `num_rows` rows, rounded up to whole Zarr shards; see the head of this file."""
    shards = -(-num_rows // ROWS_PER_SHARD)
    spec = store_spec((FLAT,)).with_progress(num_rows=shards * ROWS_PER_SHARD, num_commits=shards, complete=True)
    for name, data in layout.array_metadata(spec).items():
        (path / name).parent.mkdir(parents=True)
        (path / name).write_bytes(data)
    codes = layout.encode_zarr_shard(spec, FLAT, draw_codes(ROWS_PER_SHARD, FLAT))
    _link(path, [layout.shard_file(FLAT.name, shard, 1) for shard in range(shards)], codes)
    labels = layout.encode_label_shard(spec, np.zeros(ROWS_PER_SHARD, np.int64))
    _link(path, [layout.shard_file(layout.LABEL, shard, 0) for shard in range(shards)], labels)
    (path / "zarr.json").write_bytes(layout.group_metadata(spec))
    return path


def _link(store: Path, names: list[str], data: bytes) -> None:
    """Puts the same bytes under many names."""
    for begin in range(0, len(names), MAX_LINKS):
        first = f"{store}/{names[begin]}"
        for name in names[begin : begin + MAX_LINKS]:
            path = f"{store}/{name}"
            os.makedirs(path.rpartition("/")[0], exist_ok=True)
            if path == first:
                Path(first).write_bytes(data)
            else:
                os.link(first, path)
