"""What a pass over so many images costs and what breaks first: `python -m benchmarks.sizing --images 1e6 1e8 1e10`.

Requests, objects and bytes are counted from what the code does (docs/object-stores.md); memory of the driver is measured here, on objects of
the kinds that it keeps; `--images-a-second` of one worker and `--driver-us` are yours to measure: `vqmill tokenize --dry-run` prints the
first, `python -m benchmarks simulation` the second.
"""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.corpus.objects import PART_BYTES
from pipelines.corpus.plan import InputShard, TarFile
from pipelines.spans import WINDOW
from vqmill.commits import Commit, Counts, Cursor
from vqmill.spec import LevelSpec, default_rows_per_shard

LISTED, READERS = 1000, 16  # objects in an answer; commit records read at a time
GET_SECONDS = 0.03  # of a small object: what S3 takes about
SAMPLE = 10_000


@dataclass(frozen=True)
class Job:
    """What is to be tokenized, and with what.

    Attributes:
        images: how many.
        image_bytes: of a file.
        per_tar: images of an input shard.
        levels: of the codes.
        rows_per_shard: of a Zarr shard; None for the store's own rule.
        stored_share: of the raw codes, what is left after compression.
        table_bytes: a row of the samples table, stored.
        workers: encoder actors.
        rate: images a second of one worker.
        driver_seconds: of the driver's processor for each row.
    """

    images: int
    image_bytes: float
    per_tar: int
    levels: tuple[LevelSpec, ...]
    rows_per_shard: int | None
    stored_share: float
    table_bytes: float
    workers: int
    rate: float
    driver_seconds: float


def object_bytes(make: Callable[[int], Any]) -> float:
    """Memory that one of many objects takes, bytes."""
    tracemalloc.start()
    kept = [make(number) for number in range(SAMPLE)]
    size = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    return size


def _input_shard(number: int) -> InputShard:
    path = f"s3://bucket/photos/{number:09d}.tar"
    shard = InputShard(number, path.rpartition("/")[2], 10_000, 10**9, TarFile(path, etag=f'"{number:032x}"'))
    assert shard.digest  # cached with it
    return shard


def _commit(files: int) -> Callable[[int], Commit]:
    def make(number: int) -> Commit:
        facts = {f"level-{file}/c/{number}/0/0": {"bytes": number, "sha256": f"{number:064x}"} for file in range(files)}
        return Commit(number, 4096 * number, 4096, Cursor(number, 0, 0), Counts(4096, 0, 0), facts)

    return make


def costs(job: Job) -> list[tuple[str, str]]:
    """The lines of a column of the table, by what they are of."""
    levels = len(job.levels)
    rows_per_shard = job.rows_per_shard or default_rows_per_shard(job.levels)
    tars, zarr_shards = -(-job.images // job.per_tar), -(-job.images // rows_per_shard)
    read = job.images * job.image_bytes
    raw = sum(level.row_bytes for level in job.levels)
    written = job.images * (raw * job.stored_share + job.table_bytes)
    plan, records = tars * object_bytes(_input_shard), zarr_shards * object_bytes(_commit(levels + 3))
    seconds = job.images / (job.rate * job.workers)
    driver = job.images * job.driver_seconds
    resume = zarr_shards * GET_SECONDS / READERS
    waiting = WINDOW * job.workers * min(job.per_tar, 64 * 256) * raw
    return [
        ("input shards", f"{tars:,}"),
        ("read", size(read)),
        ("requests to read it: planning, encoding", f"{2 * tars + -(-tars // LISTED) + 2 * int(read / PART_BYTES):,}"),
        ("written", size(written)),
        ("Zarr shards; objects", f"{zarr_shards:,}; {zarr_shards * (levels + 4):,}"),
        ("requests to write them", f"{zarr_shards * (3 * levels + 7):,}"),
        ("hours of the encoders", f"{seconds / 3600:,.1f}"),
        ("of the driver's one core", f"{driver / seconds:.0%}"),
        ("workers that keep it busy", f"{1 / (job.driver_seconds * job.rate):,.0f}"),
        ("the driver's memory: plan, commit records", f"{size(plan)}, {size(records)}"),
        ("codes that wait for their turn, at most", size(waiting)),
        ("reading the commit records when it goes on", f"{resume:,.0f} s"),
        ("the last input shard, alone", f"{job.per_tar / job.rate:,.0f} s"),
    ]


def size(number: float) -> str:
    """Bytes in the unit that reads best.

    >>> size(1234), size(5.6e12)
    ('1.2 kB', '5.6 TB')
    """
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizing", description=__doc__)
    parser.add_argument("--images", nargs="+", type=float, default=[1e6, 1e8, 1e10])
    parser.add_argument("--image-kb", type=float, default=110)
    parser.add_argument("--per-tar", type=int, default=10_000)
    parser.add_argument(
        "--grid", nargs="+", type=int, default=[32, 64], help="sides of the levels' grids, the smallest first"
    )
    parser.add_argument("--codebook-size", type=int, default=512)
    parser.add_argument("--shard-rows", type=int, help="rows of a Zarr shard; the store's own rule if not given")
    parser.add_argument("--stored-share", type=float, default=0.95, help="of raw codes after compression")
    parser.add_argument("--table-bytes", type=float, default=30, help="of a row of the samples table")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--images-a-second", type=float, required=True, help="of one worker")
    parser.add_argument(
        "--driver-us", type=float, required=True, help="microseconds of the driver's processor for each row"
    )
    asked = parser.parse_args()
    levels = tuple(
        LevelSpec(f"level{number}", asked.codebook_size, (side, side)) for number, side in enumerate(asked.grid)
    )
    columns = [
        costs(
            Job(
                int(images),
                asked.image_kb * 1e3,
                asked.per_tar,
                levels,
                asked.shard_rows,
                asked.stored_share,
                asked.table_bytes,
                asked.workers,
                asked.images_a_second,
                asked.driver_us / 1e6,
            )
        )
        for images in asked.images
    ]
    print(f"| {asked.workers} workers | {' | '.join(f'{int(images):,} images' for images in asked.images)} |")
    print("|---" * (1 + len(columns)) + "|")
    for lines in zip(*columns, strict=True):
        print(f"| {lines[0][0]} | {' | '.join(value for _, value in lines)} |")


if __name__ == "__main__":
    main()
