"""Prints one table: what was done, ours, the other, and their ratio (above 1: ours is faster). Generated data only."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from vector_quantize_pytorch import VectorQuantize

import tokenizer
import vqmill
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.samples import read_samples
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.memory import keep_freed_memory
from pipelines.scenes import write_corpus
from tokenizer.search import nearest
from vqmill.spec import LevelSpec, Segment, StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard

REPEATS = 5
IMAGES = 1024


def seconds(work: Callable[[], Any]) -> float:
    """The median of some runs, after one to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def search() -> tuple[str, float, float]:
    """Nearest codes of 65,536 vectors, against the distance matrix of torch.cdist."""
    z, codebook = torch.randn(65_536, 64), torch.randn(512, 64)
    return (
        "nearest code, 65,536 x 64, K = 512, against torch.cdist + argmin",
        seconds(lambda: nearest(z, codebook)),
        seconds(lambda: torch.cdist(z, codebook).argmin(dim=1)),
    )


def quantizer() -> tuple[str, float, float]:
    """One training step of the quantizer alone, against vector-quantize-pytorch."""
    z = torch.randn(16, 64, 32, 32, requires_grad=True)
    ours = tokenizer.EMAQuantizer(512, 64, start_step=1)
    peer = VectorQuantize(dim=64, codebook_size=512, decay=0.99, accept_image_fmap=True, threshold_ema_dead_code=1)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        found = ours.train()(z)
        (found.vectors.sum() + found.loss).backward()
        ours.update(found.counts, found.sums, found.pool, generator)

    def peer_step() -> None:
        vectors, _, loss = peer.train()(z)
        (vectors.sum() + loss.sum()).backward()

    return (
        "quantizer, forward + backward + update, 16 x 64 x 32 x 32, against vector-quantize-pytorch",
        seconds(step),
        seconds(peer_step),
    )


def tar_reading(folder: Path) -> tuple[str, float, float]:
    """Samples of tar shards, not decoded, against webdataset's reader."""
    plan = plan_corpus(str(folder))
    names = [str(path) for path in sorted(folder.glob("*.tar"))]

    def ours() -> int:
        return sum(1 for shard in plan.shards for _ in read_samples(shard))

    def peer() -> int:
        return sum(1 for _ in webdataset.WebDataset(names, shardshuffle=False))

    assert ours() == peer() == IMAGES
    return f"reading {IMAGES:,} samples from tars, against webdataset", seconds(ours), seconds(peer)


def encoding(folder: Path) -> tuple[str, float, float]:
    """Tars to codes through an encoder, against encoding alone with the pixels already in memory."""
    model = tokenizer.from_preset("rgb32").eval()
    encoder = SpanEncoder(tokenizer.dumps(model), Preprocessing(size=32, channels=3), Encoding(), "cpu")
    plan = plan_corpus(str(folder))
    images = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)

    def ours() -> int:
        return sum(span.samples.num_rows for shard in plan.shards for span in encoder.spans(shard))

    def limit() -> None:
        for _ in range(IMAGES // 32):
            model.encode(images)

    return (
        f"tokenizing {IMAGES:,} images from tars on one core, against the network alone",
        seconds(ours),
        seconds(limit),
    )


def loading(folder: Path) -> tuple[str, float, float]:
    """An epoch of shuffled batches from a store, against fancy indexing of an array in memory."""
    rows, rows_per_shard = 32_768, 4096
    level = LevelSpec("codes", 512, (16, 16))
    spec = StoreSpec((level,), rows_per_shard, {"fingerprint": "none"}, segments=(Segment("none"),))
    codes = np.random.default_rng(0).integers(0, 512, (rows, 16, 16), dtype=np.uint16)
    known = {"source": "s", "input_shard": 0, "label": 0, "width": 1, "height": 1}
    with StoreWriter(folder / "codes.zarr", spec) as writer:
        for shard in range(rows // rows_per_shard):
            part = range(shard * rows_per_shard, (shard + 1) * rows_per_shard)
            samples = pa.Table.from_pylist(
                [{**known, "key": str(row), "index": row} for row in part], schema=SAMPLES_SCHEMA
            )
            files = write_shard(
                writer.store,
                spec,
                shard,
                {"codes": codes[part.start : part.stop]},
                samples,
                QUARANTINE_SCHEMA.empty_table(),
            )
            writer.commit(len(part), Cursor(0, 0, part.stop), Counts(len(part)), files)
        writer.finish()
    batches = vqmill.open_codes(folder / "codes.zarr").batches(256, shuffle=True)

    def ours() -> int:
        return sum(len(batch["codes"]) for batch in batches)

    def limit() -> int:
        order = np.random.default_rng(0).permutation(rows)
        return sum(len(codes[order[first : first + 256]]) for first in range(0, rows, 256))

    return f"an epoch of {rows:,} shuffled rows of 16 x 16, against an array in memory", seconds(ours), seconds(limit)


def main() -> None:
    """Measures and prints."""
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "scenes", num_images=IMAGES, num_shards=2, side=32)
        results = [search(), quantizer(), tar_reading(folder / "scenes"), encoding(folder / "scenes"), loading(folder)]
    for title, ours, other in results:
        print(f"{other / ours:6.2f}  {title}: {ours * 1e3:,.1f} ms against {other * 1e3:,.1f} ms")


if __name__ == "__main__":
    main()
