"""What a store in a bucket costs: writing and reading it against raw puts and gets of the same objects, on an S3 server of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import vqmill
from benchmarks.measure import Line, compare
from benchmarks.stores import LEVEL, draw_codes, store_spec, write_store
from vqmill.bucket import Bucket
from vqmill.layout import shard_file
from vqmill.verify import verify_store

ROWS = 16_384  # four Zarr shards of some 4 MB
BATCH = 256


def buckets(folder: Path) -> Iterator[Line]:
    """Writing, verifying and reading a store in a bucket against raw requests for the same objects, all one after the other."""
    with _server(folder) as bucket:
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


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """An S3 server (moto) as a process, and the address of a bucket in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    keys = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
    before = dict(os.environ)
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        os.environ.update(keys)
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bench", method="PUT")).close()  # noqa: S310
                break
            except OSError:
                time.sleep(0.1)
        yield "s3://bench"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.terminate()
        server.wait()
