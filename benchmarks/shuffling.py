"""How well loaders shuffle: the variance of batch means, against that of a perfect shuffle.

Rows are in the worst order there is: each holds its own number, and they are sorted. A perfect shuffle of N rows gives batch means of B
rows with variance s^2 / B * (N - B) / (N - 1), where s^2 is the variance over all rows: that of independent draws, with the correction for
not putting rows back (here a factor of 0.9995). The ratio to that is printed: 1 is perfect, and without any shuffle it is near B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import vqmill
from benchmarks.measure import Line, Target
from benchmarks.peers import BATCH, CHUNK_BYTES, NAMES, Peer
from benchmarks.stores import LEVEL, store_spec, write_store

Array = np.ndarray[Any, np.dtype[Any]]

ROWS = 524_288  # 1 GiB of raw codes, several times the default pool, as real stores are
EPOCHS = 16
PEER_EPOCHS = 2
PEER_WORKERS = 2


def variance(folder: Path) -> Iterator[Line]:
    """Batch means of sorted rows under each loader's default shuffle: ours, litdata's and MDS's."""
    blank = np.broadcast_to(np.zeros((), LEVEL.dtype), (ROWS, *LEVEL.grid))
    path = write_store(folder / "sorted.zarr", store_spec(), {"codes": blank}, np.arange(ROWS))
    batches = vqmill.open_codes(path).batches(BATCH, shuffle=True)
    numbers = folder / "numbers.npy"
    np.save(numbers, np.arange(ROWS)[:, None])

    def ours() -> Array:
        return np.array([float(batch["label"].mean()) for batch in batches if len(batch["label"]) == BATCH])

    yield _line("ours", ours, EPOCHS, Target(1.25, at_most=True))
    for name in NAMES:
        # The peers shuffle by rows of their chunks. So rows may be small when a chunk has as many of them as it would have of codes.
        with Peer(name, numbers, folder / name, PEER_WORKERS, CHUNK_BYTES // LEVEL.row_bytes) as peer:
            yield _line(name, peer.means, PEER_EPOCHS, None)


def perfect_variance(num_rows: int, batch: int) -> float:
    """The variance of the mean of `batch` of the numbers 0..num_rows-1, drawn without putting back."""
    spread = (num_rows**2 - 1) / 12
    return spread / batch * (num_rows - batch) / (num_rows - 1)


def _line(name: str, epoch_means: Callable[[], Array], epochs: int, target: Target | None) -> Line:
    means = np.concatenate([epoch_means() for _ in range(epochs)])
    found = float(np.square(means - (ROWS - 1) / 2).mean())
    perfect = perfect_variance(ROWS, BATCH)
    title = f"variance of batch means over a perfect shuffle's, {ROWS:,} sorted rows of 2 KiB, batch {BATCH}, {epochs} epochs, {name}"
    return Line(found / perfect, title, f"{found:.3g}", f"{perfect:.3g}", target)
