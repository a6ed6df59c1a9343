"""Loaders that others wrote, each in a process of its own: litdata, and mosaicml-streaming with its format MDS.

Run as `python -m benchmarks.peers NAME ROWS.npy FOLDER WORKERS CHUNK_ROWS` it is that process. A process each, because both start
threads, fork workers and keep state in shared memory, which must not touch our measurement or that of the other. The rows travel as a
raw .npy file; a line `epoch` or `means` on standard input is answered by a line of JSON.

Both write what they call a chunk or shard of about 64 MiB, uncompressed, and keep their default shuffle. litdata reads rows as token blocks
(`TokensLoader`), which is its fastest form for arrays of one size; MDS as an `ndarray` column of fixed shape.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.measure import timed

Array = np.ndarray[Any, np.dtype[Any]]

NAMES = ("litdata", "MDS")
BATCH = 256
WORKERS = (0, 2)  # measured with each; the better counts
CHUNK_BYTES = 64 * 1024 * 1024
ANSWER_SECONDS = 300
SAMPLE_OVERHEAD, SHARD_OVERHEAD = 4, 4096  # bytes that MDS counts into a shard: an offset for each sample, and a header
PAGE = 2048  # uint16 values of a memory page of 4 KiB


def touch(batch: Array, row_shape: tuple[int, ...]) -> int:
    """What every consumer does with a batch: looks that it is one block of whole rows, and reads from each page of it.

    Returns:
        How many rows there are.
    """
    assert batch.shape[1:] == row_shape, batch.shape
    assert batch.flags.c_contiguous
    int(batch.reshape(-1)[::PAGE].sum())
    return len(batch)


class Peer:
    """A peer's loader over an array, in its own process; use it as a context manager."""

    def __init__(self, name: str, rows: Path, folder: Path, workers: int, chunk_rows: int | None = None) -> None:
        """Starts the process, which writes the peer's files unless an earlier one did.

        Args:
            name: one of NAMES.
            rows: an .npy file [n, ...].
            folder: for the peer's files.
            workers: worker processes of its DataLoader.
            chunk_rows: rows of a chunk; None for about CHUNK_BYTES.
        """
        self.name, self.workers = name, workers
        shape = np.load(rows, mmap_mode="r").shape
        row_bytes = int(np.load(rows, mmap_mode="r")[:1].nbytes)
        self.num_rows = shape[0]
        arguments = [name, str(rows), str(folder), str(workers), str(chunk_rows or CHUNK_BYTES // row_bytes)]
        self._log = folder.with_name(f"{folder.name}-{workers}.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers", *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
            )  # fmt: skip
        self._ask("ready")

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def epoch(self) -> float:
        """Seconds of one epoch."""
        return self._ask("epoch")

    def means(self) -> Array:
        """The mean of each whole batch of one epoch, float64 [batches]."""
        return np.array(self._ask("means"))

    def _ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
            answer = self._process.stdout.readline() if ready else ""
        except BrokenPipeError:
            answer = ""
        if not answer:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(
                f"{self.name} with {self.workers} workers gave no answer to {question!r} in {ANSWER_SECONDS} s, or died. "
                f"The end of what it printed:\n{tail}\nInstall the peers with: pip install -e '.[bench]'"
            )
        return json.loads(answer)


def _litdata_batches(rows: Array, folder: Path, workers: int, chunk_rows: int) -> Iterable[Array]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    block = rows[0].size
    if not (folder / "index.json").exists():
        writer = BinaryWriter(str(folder), chunk_size=chunk_rows * block, item_loader=TokensLoader(block))
        for number, row in enumerate(rows):
            writer[number] = row.reshape(-1)
        writer.done()
        writer.merge()
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    return _Loader(loader, lambda batch: batch.numpy().reshape(-1, *rows.shape[1:]))


def _mds_batches(rows: Array, folder: Path, workers: int, chunk_rows: int) -> Iterable[Array]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    if not (folder / "index.json").exists():
        kind = f"ndarray:{rows.dtype.name}:{','.join(map(str, rows.shape[1:]))}"
        size = chunk_rows * (rows[0].nbytes + SAMPLE_OVERHEAD) + SHARD_OVERHEAD
        with MDSWriter(out=str(folder), columns={"codes": kind}, size_limit=size) as writer:
            for row in rows:
                writer.write({"codes": row})
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    return _Loader(loader, lambda batch: batch["codes"].numpy())


class _Loader:
    """A loader's batches as arrays; each `iter` is an epoch."""

    def __init__(self, loader: Iterable[Any], array: Any) -> None:
        self._loader, self._array = loader, array

    def __iter__(self) -> Iterator[Array]:
        return map(self._array, self._loader)


def _serve(name: str, rows: Array, folder: Path, workers: int, chunk_rows: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the libraries print to standard output
    warnings.simplefilter("ignore")
    batches = {"litdata": _litdata_batches, "MDS": _mds_batches}[name](rows, folder, workers, chunk_rows)

    def epoch() -> None:
        assert sum(touch(batch, rows.shape[1:]) for batch in batches) == len(rows), f"{name} lost rows"

    def means() -> list[float]:
        return [float(batch.mean()) for batch in batches if len(batch) == BATCH]

    for line in sys.stdin:
        question = line.strip()
        answer = {"ready": lambda: True, "epoch": lambda: timed(epoch), "means": means}[question]()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _name, _rows, _folder, _workers, _chunk_rows = sys.argv[1:]
    _serve(_name, np.load(_rows, mmap_mode="r"), Path(_folder), int(_workers), int(_chunk_rows))
