"""From tar shards to codes, against webdataset's reader and against the network alone. Generated scenes only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset

import tokenizer
from benchmarks.measure import Line, compare
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.corpus.samples import read_samples
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed
from pipelines.memory import keep_freed_memory
from pipelines.scenes import write_corpus

IMAGES = 1024


def tars(folder: Path) -> Iterator[Line]:
    """Samples of tar shards, not decoded, against webdataset's reader."""
    plan = _scenes(folder)
    names = [str(path) for path in sorted((folder / "scenes").glob("*.tar"))]

    def ours() -> int:
        return sum(1 for shard in plan.shards for _ in read_samples(shard))

    def peer() -> int:
        return sum(1 for _ in webdataset.WebDataset(names, shardshuffle=False))

    assert ours() == peer() == IMAGES
    yield compare(f"reading {IMAGES:,} samples from tars, against webdataset", ours, peer)


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
