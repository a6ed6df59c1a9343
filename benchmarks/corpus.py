"""From tar shards to codes, against webdataset's reader and against the network alone. Generated scenes only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset

import tokenizer
from benchmarks.measure import Line, best, compare, speed
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.corpus.samples import list_samples, load_sample, read_samples
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed
from pipelines.memory import keep_freed_memory
from pipelines.scenes import write_corpus

IMAGES = 1024
FILES, FILE_BYTES = 1000, 110_000  # as ImageNet's


def tars(folder: Path) -> Iterator[Line]:
    """Samples of tar shards, not decoded, against webdataset's reader."""
    plan = _scenes(folder)
    names = [str(path) for path in sorted((folder / "scenes").glob("*.tar"))]

    def ours() -> int:
        return sum(1 for shard in plan.shards for _ in read_samples(shard))

    def peer() -> int:
        return sum(1 for _ in webdataset.WebDataset(names, shardshuffle=False))

    assert ours() == peer() == IMAGES
    yield compare(f"reading {IMAGES:,} samples from tars, against webdataset", ours, peer, 3.0)


def raw(folder: Path) -> Iterator[Line]:
    """Tars of files as large as photographs, not decoded, streamed and by index, against reading the same bytes at once."""
    keep_freed_memory()
    path = folder / "photographs.tar"
    random = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(FILES):
            writer.write(
                {"__key__": f"{number:06d}", "jpg": random.bytes(FILE_BYTES), "cls": str(number % 10).encode()}
            )
    (shard,) = plan_corpus(str(path)).shards
    refs = list(list_samples(shard))

    def everything() -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

    def streamed() -> int:
        return sum(1 for _ in read_samples(shard))

    def indexed() -> None:
        for ref in refs:
            load_sample(shard, ref)

    found = best({"raw": everything, "streamed": streamed, "indexed": indexed}, repeats=7)
    name = f"{FILES:,} files of {FILE_BYTES // 1000} kB in a tar"
    yield speed(f"{name}, streamed, against reading the tar", found["streamed"], found["raw"], 0.30)
    yield speed(f"{name}, by index, against reading the tar", found["indexed"], found["raw"], 0.8)


def encoding(folder: Path) -> Iterator[Line]:
    """Tars to codes through an encoder, against encoding alone with the pixels already in memory."""
    keep_freed_memory()
    plan = _scenes(folder)
    model = tokenizer.from_preset("rgb32").eval()
    encoder = SpanEncoder(packed(model), Preprocessing(size=32, channels=3), Encoding(), "cpu")
    images = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)

    def ours() -> int:
        return sum(span.samples.num_rows for shard in plan.shards for span in encoder.spans(shard))

    def limit() -> None:
        for _ in range(IMAGES // 32):
            model.encode(images)

    yield compare(f"tokenizing {IMAGES:,} images from tars on one core, against the network alone", ours, limit)


def _scenes(folder: Path) -> Plan:
    if not (folder / "scenes").exists():
        write_corpus(folder / "scenes", num_images=IMAGES, num_shards=2, side=32)
    return plan_corpus(str(folder / "scenes"))
