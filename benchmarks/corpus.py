"""From tar shards to codes, against webdataset's reader and against the network alone. Generated scenes only."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import webdataset

import tokenizer
from benchmarks.measure import Line, best, compare, speed
from benchmarks.server import s3_server
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.objects import PART_BYTES, PARTS_AHEAD, open_object
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
    path = _photographs(folder)
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


def s3(folder: Path) -> Iterator[Line]:
    """The same tar in a bucket of an S3 server of this machine, not decoded, against getting its parts, as many at once."""
    import obstore
    from obstore.store import from_url

    keep_freed_memory()
    path = _photographs(folder)
    with s3_server(folder) as bucket, ThreadPoolExecutor(PARTS_AHEAD + 1) as threads:
        store = from_url(bucket, client_options={"allow_http": True})  # pyright: ignore[reportCallIssue, reportArgumentType]
        obstore.put(store, path.name, path)
        (shard,) = plan_corpus(f"{bucket}/{path.name}").shards
        ranges = [(start, min(start + PART_BYTES, shard.num_bytes)) for start in range(0, shard.num_bytes, PART_BYTES)]

        def get(part: tuple[int, int]) -> int:
            return len(obstore.get(store, path.name, options={"range": part}).bytes())

        def parts() -> int:
            return sum(threads.map(get, ranges))

        def streamed() -> int:
            open_object.cache_clear()  # parts of the run before
            return sum(1 for _ in read_samples(shard))

        assert (parts(), streamed()) == (path.stat().st_size, FILES)
        found = best({"ours": streamed, "raw": parts}, repeats=7)
    name = f"{FILES:,} files of {FILE_BYTES // 1000} kB in a tar in a bucket"
    yield speed(f"{name}, against getting its {len(ranges)} parts", found["ours"], found["raw"], 0.5)


def _photographs(folder: Path) -> Path:
    """A tar of files as large as photographs, of random bytes."""
    path = folder / "photographs.tar"
    random = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(FILES):
            writer.write(
                {"__key__": f"{number:06d}", "jpg": random.bytes(FILE_BYTES), "cls": str(number % 10).encode()}
            )
    return path


def _scenes(folder: Path) -> Plan:
    if not (folder / "scenes").exists():
        write_corpus(folder / "scenes", num_images=IMAGES, num_shards=2, side=32)
    return plan_corpus(str(folder / "scenes"))
