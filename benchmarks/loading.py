"""Shuffled epochs of a code store: speed against other loaders and against memory, and the memory they take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import vqmill
from benchmarks.measure import Line, Target, medians, speed, timed
from benchmarks.peers import BATCH, NAMES, WORKERS, Peer, touch
from benchmarks.stores import LEVEL, ROWS, draw_codes, entropy, store_spec, write_store
from vqmill import native

PEER_TARGETS = {"litdata": 5.0, "MDS": 50.0}
MEMORY_TARGETS = {"blosc-zstd": 0.25, "blosc-lz4": 0.40}
REPEATS = 3  # MDS takes most of the time
MEBIBYTE = 1024 * 1024


def epoch(folder: Path) -> Iterator[Line]:
    """An epoch of shuffled batches, each codec against litdata, MDS and a memory-mapped array of the raw codes."""
    codes = draw_codes(ROWS)
    bits = entropy(np.bincount(codes.reshape(-1)))
    what = f"shuffled epoch, {ROWS:,} rows [32, 32] uint16 of {bits:.2f} bits, batch {BATCH}"
    np.save(folder / "codes.npy", codes)
    works: dict[str, Callable[[], float]] = {}
    for codec in MEMORY_TARGETS:
        path = write_store(folder / f"{codec}.zarr", store_spec(codec=codec), {"codes": codes})
        works[codec] = lambda path=path: timed(_our_epoch(path))
    del codes
    raw = np.load(folder / "codes.npy", mmap_mode="r")

    def gather() -> None:
        order = np.random.default_rng(0).permutation(ROWS)
        batches = (np.take(raw, order[first : first + BATCH], axis=0) for first in range(0, ROWS, BATCH))
        assert sum(touch(batch, LEVEL.grid) for batch in batches) == ROWS

    works["memory"] = lambda: timed(gather)
    with ExitStack() as stack:
        for name in NAMES:
            for workers in WORKERS:
                peer = stack.enter_context(Peer(name, folder / "codes.npy", folder / name, workers))
                works[f"{name} ({workers} workers)"] = peer.epoch
        found = medians(works, REPEATS, clock=_warm)
    best = {name: min((work for work in found if work.startswith(name)), key=found.__getitem__) for name in NAMES}
    for codec, memory_target in MEMORY_TARGETS.items():
        for name, other in best.items():
            yield speed(f"{what}, {codec}, against {other}", found[codec], found[other], PEER_TARGETS[name])
        title = f"{what}, {codec}, against a gather from a memory map"
        yield speed(title, found[codec], found["memory"], memory_target)


def _warm(work: Callable[[], float]) -> float:
    """The second of two runs in a row: what waited long has cold pages, and the peer before may still be at it."""
    work()
    return work()


def _our_epoch(path: Path) -> Callable[[], None]:
    batches = vqmill.open_codes(path).batches(BATCH, shuffle=True)

    def run() -> None:
        assert sum(touch(batch["codes"], LEVEL.grid) for batch in batches) == ROWS

    return run


def resident(folder: Path) -> Iterator[Line]:
    """How much a process grows during a shuffled epoch, against the pool it was asked to keep to."""
    path = write_store(folder / "codes.zarr", store_spec(), {"codes": draw_codes(ROWS)})
    compiled = native.PROCESS.read_chunks(0) is not None
    for pool in (16 * MEBIBYTE, 64 * MEBIBYTE, 128 * MEBIBYTE):
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.resident", str(path), str(pool), str(int(compiled))],
            check=True,
            capture_output=True,
        )
        found = json.loads(answer.stdout)
        growth, code = found["growth_bytes"], found["code_bytes"]
        yield Line(
            growth / pool,
            f"peak resident memory of a shuffled epoch over that before it, pool_bytes={pool // MEBIBYTE} MiB, raw codes {ROWS * LEVEL.row_bytes // MEBIBYTE} MiB"
            + (f", without the compiled code's {code / MEBIBYTE:,.0f} MiB" if compiled else ""),
            f"{growth / MEBIBYTE:,.1f} MiB",
            f"{pool / MEBIBYTE:,.1f} MiB",
            Target(1.0, at_most=True),
        )
