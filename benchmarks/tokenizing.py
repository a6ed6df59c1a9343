"""From tars to a store with two workers, against what people would write instead: steady state, start-up not counted.

Everyone has the same two cores, images, tokenizer and batch size. Only our own runs, and the script, write anything; the others' codes are thrown away,
which is in their favour.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import tokenizer
from benchmarks.measure import Line, Target
from pipelines.cluster import WORKER_ENVIRONMENT, ray_cluster
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard, plan_corpus
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed
from pipelines.scenes import CLASSES, scene
from pipelines.tokenize import TokenizeOptions, tokenize_corpus

SIDE, SIZE = 256, 64  # of the files, of what is encoded
DRAWN, COPIES, TARS = 256, 32, 16
BATCH, WORKERS, REPEATS = 32, 2, 3
Arrivals = list[tuple[float, int]]  # when so many images more were done


def tokenizing(folder: Path) -> Iterator[Line]:
    """Two workers against an ideal loop without Ray, Ray Data (fused; separate stages), and a DataLoader script with a .npy for each image."""
    os.environ.update(WORKER_ENVIRONMENT)  # of the processes that are started from here
    tars, files = _corpus(folder)
    model = tokenizer.from_preset("rgb32").eval()
    stores = itertools.count()
    with ray_cluster(2 * WORKERS):  # so that Ray Data has slots for its decode tasks, too
        works: dict[str, Callable[[], Arrivals]] = {
            "ours": lambda: _ours(tars, model, folder / f"{next(stores)}.zarr"),
            "ideal": lambda: _ideal(tars, model),
            "fused": lambda: _ray_data(tars, model, fused=True),
            "stages": lambda: _ray_data(tars, model, fused=False),
            "script": lambda: _script(files, model, folder / "npy"),
        }
        rates = {name: [] for name in works}
        for _ in range(REPEATS):
            for name, work in works.items():
                rates[name].append(_rate(work()))
    found = {name: statistics.median(values) for name, values in rates.items()}
    for name, title, target in (
        ("ideal", "the same encoder in two processes without Ray, nothing written", 0.95),
        ("fused", "Ray Data, an actor for read, decode and encode", 1.15),
        ("stages", "Ray Data, stages of their own for read, decode and encode", 1.25),
        ("script", "a DataLoader over loose files that saves a .npy for each image", 1.5),
    ):
        yield Line(
            found["ours"] / found[name], f"tokenizing {SIDE}-pixel JPEGs at {SIZE}, {WORKERS} workers, against {title}",
            f"{found['ours']:,.0f} images/s", f"{found[name]:,.0f} images/s", Target(target),
        )  # fmt: skip


def _rate(arrivals: Arrivals) -> float:
    """Images a second from the first arrival to the last."""
    arrivals = sorted(arrivals)
    return sum(number for _, number in arrivals[1:]) / (arrivals[-1][0] - arrivals[0][0])


def _corpus(folder: Path) -> tuple[str, Path]:
    """The same images as tars and as loose files."""
    images: list[bytes] = []
    for number in range(DRAWN):
        data = io.BytesIO()
        picture = scene(CLASSES[number % len(CLASSES)], np.random.default_rng([0, number]), SIDE)
        Image.fromarray(picture).save(data, "JPEG", quality=90)
        images.append(data.getvalue())
    (folder / "files" / "scenes").mkdir(parents=True)
    (folder / "tars").mkdir()
    total = DRAWN * COPIES
    for tar in range(TARS):
        with webdataset.TarWriter(str(folder / "tars" / f"{tar:06d}.tar")) as writer:
            for index in range(tar * total // TARS, (tar + 1) * total // TARS):
                writer.write({"__key__": f"{index:06d}", "jpg": images[index % DRAWN]})
                (folder / "files" / "scenes" / f"{index:06d}.jpg").write_bytes(images[index % DRAWN])
    return str(folder / "tars"), folder / "files"


def _ours(tars: str, model: tokenizer.Tokenizer, store: Path) -> Arrivals:
    arrivals: Arrivals = []
    done = [0]

    def progress(seen: int, total: int, note: str) -> None:
        if seen > done[0]:
            arrivals.append((time.perf_counter(), seen - done[0]))
            done[0] = seen

    options = TokenizeOptions(size=SIZE, encoding=Encoding(batch_size=BATCH), workers=WORKERS)
    tokenize_corpus(plan_corpus(tars), model, store, options, progress)
    return arrivals


def encoder_of(build: Callable[[], Any]) -> SpanEncoder:
    """The encoder that everyone but the script uses."""
    return SpanEncoder(build, Preprocessing(size=SIZE, channels=3), Encoding(batch_size=BATCH), "cpu")


def _encode_all(build: Callable[[], Any], shards: Sequence[InputShard], done: Queue[tuple[float, int] | None]) -> None:
    encoder = encoder_of(build)
    for shard in shards:
        for span in encoder.spans(shard):
            done.put((time.perf_counter(), span.counts.seen))
    done.put(None)


def _ideal(tars: str, model: tokenizer.Tokenizer) -> Arrivals:
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    shards = plan_corpus(tars).shards
    workers = [
        context.Process(target=_encode_all, args=(packed(model), shards[number::WORKERS], done))
        for number in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    arrivals = [arrival for _ in workers for arrival in iter(done.get, None)]
    for worker in workers:
        worker.join()
    return arrivals


def _ray_data(tars: str, model: tokenizer.Tokenizer, *, fused: bool) -> Arrivals:
    """Codes as they reach the driver."""
    import ray.data

    from benchmarks.ray_data import Decode, Encode, EncodeShard, read_shard

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    shards = [{"shard": shard} for shard in plan_corpus(tars).shards]
    items = ray.data.from_items(shards, override_num_blocks=len(shards))
    build = packed(model)
    if fused:
        made = items.map_batches(
            EncodeShard,
            fn_constructor_args=(build,),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=WORKERS),
        )
    else:
        made = (
            items.flat_map(read_shard)
            .map_batches(Decode(SIZE), batch_size=BATCH)
            .map_batches(
                Encode,
                fn_constructor_args=(build,),
                batch_size=BATCH,
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=WORKERS),
            )
        )
    return [
        (time.perf_counter(), len(batch["top"])) for batch in made.iter_batches(batch_size=None, batch_format="numpy")
    ]


def _script(files: Path, model: tokenizer.Tokenizer, out: Path) -> Arrivals:
    """What one would write first: torchvision's transforms in DataLoader workers, a .npy for each image."""
    out.mkdir(exist_ok=True)
    steps = [
        transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIZE),
        transforms.PILToTensor(),
    ]
    loader = DataLoader(ImageFolder(str(files), transforms.Compose(steps)), batch_size=BATCH, num_workers=WORKERS)
    arrivals, saved = [], 0
    for images, _ in loader:
        codes = {level: values.numpy().astype(np.uint16) for level, values in model.encode(images).items()}
        for row in range(len(images)):
            np.save(out / f"{saved:06d}.npy", np.concatenate([values[row].ravel() for values in codes.values()]))
            saved += 1
        arrivals.append((time.perf_counter(), len(images)))
    return arrivals
