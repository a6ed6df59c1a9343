"""What a store in a bucket costs: writing and reading it against raw puts and gets of the same objects, on an S3 server of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import vqmill
from benchmarks.measure import Line, compare
from benchmarks.server import s3_server
from benchmarks.stores import LEVEL, draw_codes, store_spec, write_store
from vqmill.bucket import Bucket
from vqmill.layout import shard_file
from vqmill.verify import verify_store

ROWS = 16_384  # four Zarr shards of some 4 MB
BATCH = 256


def buckets(folder: Path) -> Iterator[Line]:
    """Writing, verifying and reading a store in a bucket against raw requests for the same objects, all one after the other."""
    with s3_server(folder) as bucket:
        spec, codes = store_spec(), {"codes": draw_codes(ROWS)}
        place = Bucket(write_store(f"{bucket}/codes.zarr", spec, codes))
        objects = {name: place.get(name)[0] for name in place.list()}
        raw = Bucket(f"{bucket}/raw")
        numbers = iter(range(10**6))

        def put() -> None:
            for name, data in objects.items():
                raw.write(name, data)

        def get(names: list[str]) -> None:
            for name in names:
                place.get(name)

        size = f"{sum(map(len, objects.values())) / 1e6:,.1f} MB in {len(objects)} objects"
        yield compare(
            f"writing {ROWS:,} rows [32, 32] uint16 ({size}), encoding and lease included, against raw puts",
            lambda: write_store(f"{bucket}/{next(numbers)}.zarr", spec, codes), put,
        )  # fmt: skip
        yield compare(
            f"verifying it ({size}) against raw gets", partial(verify_store, place), partial(get, list(objects))
        )
        shards = [name for name in objects if name.startswith("codes/c/")]
        level = vqmill.open_codes(place)["codes"]
        assert shard_file("codes", 0, len(LEVEL.grid)) in shards
        yield compare("reading all its codes, decoding included, against raw gets of the Zarr shards",
                      lambda: level[:], partial(get, shards))  # fmt: skip

        def epoch() -> None:
            for _ in vqmill.open_codes(place).batches(BATCH, shuffle=True):
                pass

        yield compare(
            f"a shuffled epoch of batches of {BATCH}, against raw gets of the Zarr shards", epoch, partial(get, shards)
        )
