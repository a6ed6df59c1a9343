"""Stores of a size that no test can write: sparse ones that claim 10^9 rows, and the memory of an epoch."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import vqmill
from vqmill import CodesError, LevelSpec, StoreSpec, layout
from vqmill.files import write_whole

LEVEL = LevelSpec("codes", 512, (2, 2))


def sparse_store(path, num_rows, rows_per_shard, present):
    """A finished store of which only some Zarr shards are there: shard s holds rows of code s mod 512, and label s."""
    spec = StoreSpec((LEVEL,), rows_per_shard, {"fingerprint": "none"}, codec="blosc-zstd")
    spec = spec.with_progress(num_rows=num_rows, num_commits=-(-num_rows // rows_per_shard), complete=True)
    for name, data in layout.array_metadata(spec).items():
        write_whole(path / name, data)
    write_whole(path / "zarr.json", layout.group_metadata(spec))
    for shard in present:
        rows = np.full((rows_per_shard, 2, 2), shard % 512)
        write_whole(path / layout.shard_file("codes", shard, 2), layout.encode_zarr_shard(spec, LEVEL, rows))
        labels = layout.encode_label_shard(spec, np.full(rows_per_shard, shard))
        write_whole(path / layout.shard_file("label", shard, 0), labels)
    return path


def calls(function):
    """How many Python functions a call enters: a measure of work that no busy machine changes."""
    count = 0

    def count_one(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_one)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, count


def test_a_billion_rows_open_and_read_like_a_thousand(tmp_path):
    few, many = 4_000, 1_000_000_000
    last = many // 1000 - 1
    small = sparse_store(tmp_path / "small.zarr", few, 1000, [0, 3])
    large = sparse_store(tmp_path / "large.zarr", many, 1000, [0, 3, 12_345, last])
    opened = {}
    for path in (small, large):
        tracemalloc.start()
        opened[path], work = calls(lambda path=path: vqmill.open_codes(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000, "opening takes memory by the size of the store"
        opened[path, "work"] = work
    assert opened[large, "work"] <= opened[small, "work"] + 10
    rows, work = calls(lambda: opened[small]["codes"][3999])
    far, far_work = calls(lambda: opened[large]["codes"][many - 1])
    assert (int(rows[0, 0]), int(far[0, 0])) == (3, last % 512)
    assert far_work <= work + 10
    assert opened[large]["codes"][12_345_678].tolist() == [[12_345 % 512] * 2] * 2
    with pytest.raises(CodesError, match=r"codes/c/777/0/0: No such file"):
        opened[large]["codes"][777_000]


def test_an_epoch_of_a_billion_rows_is_planned_at_once(tmp_path):
    """What the first batch reads, and what is read after resuming in the middle, takes no list of rows or blocks."""
    codes = vqmill.open_codes(sparse_store(tmp_path / "codes.zarr", 1_000_000_007, 1_000_000, []))
    loader = codes.batches(256, shuffle=True, seed=3)
    tracemalloc.start()
    _, work = calls(lambda: loader.load_state_dict(loader.state_dict() | {"place": 500_000_000}))
    order = loader._source.order(0, loader._shape)
    _, planned = calls(lambda: order.rows_of(3, 7))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert work < 50
    assert planned < 200
    assert peak < 40 * order.pool_rows * 8  # the rows of one pool, and what it takes to compute them
    with pytest.raises(CodesError, match="No such file"):  # it goes on to read, and the files are not there
        next(iter(loader))


def test_an_epoch_takes_no_more_memory_than_the_pool(tmp_path):
    """Measured on a process of its own: 64 MiB of codes go through a pool of 8 MiB."""
    level = LevelSpec("codes", 512, (32, 32))
    spec = replace(
        StoreSpec((level,), 2048, {"fingerprint": "none"}, codec="blosc-lz4"),
        num_rows=32_768,
        num_commits=16,
        complete=True,
    )
    path = tmp_path / "codes.zarr"
    for name, data in layout.array_metadata(spec).items():
        write_whole(path / name, data)
    write_whole(path / "zarr.json", layout.group_metadata(spec))
    rows = np.random.default_rng(0).integers(0, 512, (2048, 32, 32))
    shard = layout.encode_zarr_shard(spec, level, rows)
    for number in range(16):
        write_whole(path / layout.shard_file("codes", number, 2), shard)
        write_whole(path / layout.shard_file("label", number, 0), layout.encode_label_shard(spec, np.zeros(2048)))
    program = f"""
import resource, vqmill
codes = vqmill.open_codes({str(path)!r})
list(zip(range(2), codes.batches(64, pool_bytes=100_000)))  # everything is imported, threads have been started
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(len(batch["codes"]) for batch in codes.batches(64, shuffle=True, pool_bytes=8 * 2**20))
assert rows == 32_768, rows
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Beside the pool: the chunks that are kept (4 MiB for codes, as many for labels), a batch, a buffer for each thread.
    assert int(done.stdout) < (8 + 10) * 1024, f"{done.stdout} kilobytes"
