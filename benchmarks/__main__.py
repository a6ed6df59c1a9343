"""Prints a line for each measurement: `ratio  title: ours against other`, and beside it the target where there is one.

A ratio of speeds is above 1 when ours is faster. Where less is better (memory, variance, bits) the title says what is divided by what.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zarr

from benchmarks import (
    buckets,
    corpus,
    entropy,
    images,
    loading,
    models,
    priors,
    reading,
    scale,
    shuffling,
    simulation,
    tokenizing,
    training,
)
from benchmarks.measure import Line
from vqmill import native

Section = Callable[[Path], Iterator[Line]]

# The store first: models and corpus change for good how this process takes memory (pipelines/memory.py).
SECTIONS: dict[str, Section] = {
    "epoch": loading.epoch,
    "resident": loading.resident,
    "variance": shuffling.variance,
    "decode": reading.decode,
    "rows": reading.rows,
    "scale": scale.scale,
    "buckets": buckets.buckets,
    "entropy": entropy.bits,
    "search": models.search,
    "quantizer": models.quantizer,
    "training": training.training,
    "workers": training.workers,
    "sampling": priors.sampling,
    "prior": priors.prior,
    "images": images.decoding,
    "tars": corpus.tars,
    "raw": corpus.raw,
    "s3": corpus.s3,
    "encoding": corpus.encoding,
    "tokenizing": tokenizing.tokenizing,
    "simulation": simulation.simulation,
}


def main() -> None:
    """Measures what was asked for, and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure; all without a name")
    parser.add_argument("--list", action="store_true", help="print the names, and measure nothing")
    parser.add_argument("--store", type=Path, help="for `entropy`: a code store, instead of training a tokenizer now")
    parser.add_argument("--python", action="store_true", help="read chunks in Python, as without the extra `fast`")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in SECTIONS]:
        parser.error(f"no measurement is called {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    if asked.store and asked.names and "entropy" not in asked.names:
        parser.error("--store belongs to `entropy`, which was not asked for")
    sections = SECTIONS | {"entropy": partial(entropy.bits, store=asked.store)}
    if asked.list:
        for name, section in SECTIONS.items():
            print(f"{name:10} {(section.__doc__ or '').splitlines()[0]}")
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; "
        f"numpy {np.__version__}, zarr {zarr.__version__}; {_reading(compiled=not asked.python)}"
    )
    lines = [line for name, section in sections.items() if name in (asked.names or sections) for line in _run(section)]
    missed = [line for line in lines if line.target and not line.target.met(line.ratio)]
    print(f"{sum(line.target is not None for line in lines) - len(missed)} targets met, {len(missed)} missed")


def _reading(compiled: bool) -> str:
    """Chooses how chunks are read from the first one on, so that no measurement changes its way in the middle."""
    if compiled:
        native.load()
    native.PROCESS = native.Native(worth_bytes=0 if compiled else 2**62)
    return f"chunks are read {'by compiled code' if compiled else 'in Python'}"


def _run(section: Section) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        for line in section(Path(name)):
            print(line, flush=True)
            yield line


if __name__ == "__main__":
    main()
