"""Tokenizing 10^5 to 10^7 rows with encoders that cost nothing: what is left is our plan, Ray, the commits and the store.

The actors, the window, the writer tasks and the commits are those of `tokenize`; only pixels and network are left out: every span holds the
same 256 drawn rows. The corpus claims tars of 1,000 samples.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizer
from benchmarks.made_up import span_of
from benchmarks.measure import Line, Target, duration, speed, timed
from benchmarks.stores import draw_codes
from pipelines.assembly import Order, carry_out, extend
from pipelines.cluster import ray_cluster
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard, Plan, TarFile, plan_corpus
from pipelines.encoder import SPAN_SAMPLES, Encoding, SpanEncoder, describe_device
from pipelines.foreign import packed
from pipelines.memory import keep_freed_memory
from pipelines.scenes import write_corpus
from pipelines.spans import Encoders
from pipelines.tokenize import TokenizeOptions, store_spec, tokenize_corpus
from pipelines.watch import Watch
from vqmill.commits import Cursor
from vqmill.spec import StoreSpec
from vqmill.writer import StoreWriter

SIZES = (10**5, 10**6, 10**7)
TAR_SAMPLES, TAR_BYTES = 1000, 110_000_000
WORKERS = 2
SCENES = 1024


@dataclass(frozen=True)
class Driven:
    """What a pass cost the driver: seconds from the first span on, seconds of its processor, and the most memory it held in bytes."""

    seconds: float
    cpu_seconds: float
    most_bytes: int


def simulation(folder: Path) -> Iterator[Line]:
    """The driver's memory and the time a row from 10^5 to 10^7 rows, the share of commits in a run, and resuming a finished job."""
    model, options = tokenizer.from_preset("rgb32").eval(), TokenizeOptions(size=32, workers=WORKERS)
    found: dict[int, Driven] = {}
    with ray_cluster(WORKERS):
        for rows in SIZES:
            plan, store = _plan(rows), folder / f"{rows}.zarr"
            found[rows] = _drive(plan, store_spec(plan, model, options), store)
            if rows != SIZES[-1]:
                shutil.rmtree(store)
    small, large = found[SIZES[0]], found[SIZES[-1]]
    title = f"of {SIZES[-1]:,} rows against {SIZES[0]:,}"
    yield Line(
        large.most_bytes / small.most_bytes, f"the driver's memory at its most {title} (less is better)", f"{large.most_bytes / 1e6:,.0f} MB",
        f"{small.most_bytes / 1e6:,.0f} MB", Target(1.1, at_most=True),
    )  # fmt: skip
    name = f"encoders that cost nothing, {WORKERS} of them"
    yield speed(f"{name}, a row {title}", large.seconds / SIZES[-1], small.seconds / SIZES[0])
    yield speed(
        f"{name}, the driver's processor, a row {title}", large.cpu_seconds / SIZES[-1], small.cpu_seconds / SIZES[0]
    )
    plan, store = _plan(SIZES[-1]), folder / f"{SIZES[-1]}.zarr"
    again = timed(lambda: tokenize_corpus(plan, model, store, options, lambda *shown: None))
    yield Line(
        again / 5, f"the same command on the finished store of {SIZES[-1]:,} rows, in 5 s (less is better)", duration(again), "5.0 s",
        Target(1.0, at_most=True),
    )  # fmt: skip
    yield _commits(folder, model, options)


def _plan(rows: int) -> Plan:
    shards = [
        InputShard(
            index, f"{index:06d}.tar", min(TAR_SAMPLES, rows - start), TAR_BYTES, TarFile(f"/simulated/{index:06d}.tar")
        )
        for index, start in enumerate(range(0, rows, TAR_SAMPLES))
    ]
    return Plan("simulated", tuple(shards), (), {}, {})


def _drive(plan: Plan, spec: StoreSpec, store: Path) -> Driven:
    """Makes the store."""
    from benchmarks.costless import Costless
    from pipelines.remote import RayHands

    most, begun = [0], [0.0, 0.0]

    def shown(done: int, total: int, note: str) -> None:
        if not begun[0]:
            begun[:] = time.perf_counter(), time.process_time()
        most[0] = max(most[0], _resident())

    gc.collect()
    with StoreWriter(store, spec) as writer:
        encoders = Encoders(plan.shards, lambda: Costless.remote(writer.spec), WORKERS, describe_device("cpu"))
        watch = Watch(plan.shards, writer.counts, plan.num_samples, writer.spec.retried, shown, lambda line: None)
        end = Cursor(len(plan.shards))
        extend(writer, encoders.between(writer.cursor, end, watch), end.input_shard, RayHands())
        writer.finish()
    return Driven(time.perf_counter() - begun[0], time.process_time() - begun[1], most[0])


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def _commits(folder: Path, model: tokenizer.Tokenizer, options: TokenizeOptions) -> Line:
    """Writing and committing a Zarr shard, against encoding its rows on one core."""
    keep_freed_memory()
    write_corpus(folder / "scenes", num_images=SCENES, num_shards=1, side=32)
    (shard,) = plan_corpus(str(folder / "scenes")).shards
    encoder = SpanEncoder(packed(model), Preprocessing(size=32, channels=3), Encoding(), "cpu")
    list(encoder.spans(shard, stop_span=1))
    encoded = timed(lambda: list(encoder.spans(shard))) / SCENES
    plan = _plan(10 * 4096)
    spec = store_spec(plan, model, options)
    codes = {level.name: draw_codes(SPAN_SAMPLES, level) for level in spec.levels}
    spans = [span_of(spec, plan.shards[0], 0, codes) for _ in range(spec.rows_per_shard // SPAN_SAMPLES)]
    pieces = tuple((0, SPAN_SAMPLES, True) for _ in spans)
    counts = sum((span.counts for span in spans[1:]), spans[0].counts)
    with StoreWriter(folder / "commits.zarr", spec) as writer:
        writer.choose_codec("blosc-zstd")

        def commit() -> None:
            for number in range(8):
                written = carry_out(Order(writer.store, writer.spec, number, pieces), *spans)
                writer.commit(spec.rows_per_shard, Cursor(number + 1), counts, written.files)

        committed = timed(commit) / (8 * spec.rows_per_shard)
    return Line(
        committed / encoded, "a row written and committed against decoding and encoding it on one core, 32 pixels (less is better)",
        duration(committed), duration(encoded), Target(0.02, at_most=True),
    )  # fmt: skip
