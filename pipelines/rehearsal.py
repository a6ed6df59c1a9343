"""`tokenize --dry-run`: what a job would do, and from some samples that it encodes, how long that and how large its store would be."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpus.plan import InputShard, Plan
from pipelines.encoder import Span, SpanEncoder
from pipelines.foreign import packed
from pipelines.growth import Job, grows, planned_job
from pipelines.memory import keep_freed_memory
from pipelines.options import choose_device
from pipelines.progress import meter
from pipelines.results import Result, grids, preprocessing_line
from pipelines.tokenize import TokenizeOptions, require_room_for, store_spec
from tokenizer.protocol import ImageTokenizer
from vqmill.commits import Cursor
from vqmill.layout import encode_zarr_shard, find_spec, parquet_bytes, smallest_codec
from vqmill.places import Place, Where, place_of
from vqmill.spec import StoreSpec
from vqmill.writer import read_commits

SECONDS = 8.0  # for encoding, beyond which no further samples are taken
PLACES = 4  # input shards that are looked into, evenly spread


@dataclass
class Rehearsal:
    """What encoding some samples in this process told.

    Attributes:
        seen: samples.
        reasons: of them, those that were quarantined, by reason.
        seconds: of wall time, loading the tokenizer not counted.
        cpu_seconds: of all threads.
        codes: by level, of the encoded samples.
        samples: their rows of the samples table.
    """

    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    codes: dict[str, list[np.ndarray[Any, Any]]] = field(default_factory=dict[str, list[np.ndarray[Any, Any]]])
    samples: list[pa.Table] = field(default_factory=list[pa.Table])

    @property
    def rows(self) -> int:
        """Code rows."""
        return sum(table.num_rows for table in self.samples)

    def add(self, span: Span, seconds: float, cpu_seconds: float) -> None:
        """Takes note of one span."""
        self.seen += span.counts.seen
        self.reasons += span.reasons
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds
        if span.samples.num_rows:
            self.samples.append(span.samples)
            for level, rows in span.codes.items():
                self.codes.setdefault(level, []).append(rows)

    def row_bytes(self, spec: StoreSpec) -> float:
        """What a row would take in the store, compressed, with its line of the samples table."""
        codes = {level: np.concatenate(parts)[: spec.rows_per_shard] for level, parts in self.codes.items()}
        samples = pa.concat_tables(self.samples)[: spec.rows_per_shard]
        spec = replace(spec, codec=spec.codec or smallest_codec(spec, codes))
        stored = sum(len(encode_zarr_shard(spec, level, codes[level.name])) for level in spec.levels)
        return (stored + len(parquet_bytes(samples))) / samples.num_rows

    def job_seconds(self, samples: int, workers: int, cores: int | None = None) -> float:
        """How long so many samples would take, Ray's start not counted: as many workers at this pace, unless the cores (this machine's) are too few."""
        wall, cpu = self.seconds / workers, self.cpu_seconds / (cores or os.cpu_count() or 1)
        return samples / self.seen * max(wall, cpu)


def dry_run(plan: Plan, model: ImageTokenizer, out: Where, options: TokenizeOptions, *, retry: bool) -> Result:
    """Says what `tokenize` would do; writes nothing.

    Args:
        plan: the corpus.
        model: the tokenizer.
        out: the store's folder or address.
        options: see there.
        retry: whether samples that were set aside would be tried again.

    Raises:
        UsageError: `tokenize` would refuse.
    """
    place = place_of(out)
    found = find_spec(place)
    job = planned_job(plan, place, found, retry=retry)
    corpus, plan = plan, job.parts[-1]
    spec = store_spec(plan, model, options, found)
    if found:
        spec = replace(spec, codec=job.require_same(out, found, spec, plan).codec)
    require_room_for(plan, place, spec.row_bytes, found)
    first, todo, state = _state(place, found, job)
    raw = plan.num_samples * spec.row_bytes
    lines = [
        f"{corpus.corpus}: {len(corpus.shards):,} input shards, {corpus.num_samples:,} samples, {corpus.num_bytes / 1e6:,.1f} MB",
        f"images: {preprocessing_line(spec.preprocessing)}",
        f"{out}: {grids(spec.levels)}; at most {raw / 1e6:,.1f} MB before compression, {spec.rows_per_shard:,} rows a Zarr shard",
        state,
    ]
    facts: dict[str, Any] = {
        "samples": plan.num_samples,
        "input_shards": len(plan.shards),
        "raw_bytes": raw,
        "committed_rows": found.num_rows if found else 0,
        "appended_samples": 0 if job.retries or not found else plan.num_samples - found.segments[-1].num_samples,
        "retried_samples": job.retries,
        "samples_to_do": todo,
    }
    if todo:
        with meter("encoding some samples", "samples") as show:
            tried = rehearse(plan.shards[first:], model, options, lambda done: show(done, None))
        lines += _expected(tried, todo, spec, options)
        facts |= _estimates(tried, todo, spec, options)
    lines.append(f"{_hands(options)}; nothing was written")
    return Result(lines, facts=facts)


def _hands(options: TokenizeOptions) -> str:
    """Who would do the work."""
    place = f" of the Ray cluster {address}" if (address := options.cluster.address) else ""
    number = f"{options.workers} workers" if options.workers else "as many workers as there is room for"
    return f"{number} on {'GPUs or CPUs' if options.device == 'auto' else options.device}{place}"


def _state(place: Place, found: StoreSpec | None, job: Job) -> tuple[int, int, str]:
    """The first input shard with something to do, the samples to do, and how to say it."""
    plan = job.parts[-1]
    if not found:
        return 0, plan.num_samples, "nothing is there yet"
    last, more = found.segments[-1], plan.num_samples - found.segments[-1].num_samples
    if job.retries:
        state = f"would try {job.retries:,} quarantined samples again, behind {found.num_rows:,} rows"
        return last.input_shards, job.retries, state
    if found.complete:
        state = f"{found.num_rows:,} rows are committed already"
        grown = f"would append {more:,} samples to {found.num_rows:,} rows"
        return last.input_shards, more, grown if grows(found, plan) else state
    commits = read_commits(place, range(found.num_commits))
    seen, cursor = sum(commit.counts.seen for commit in commits), commits[-1].cursor if commits else Cursor()
    share = (seen + cursor.row) / plan.num_samples  # rows of a span that is committed in part: it will be encoded again
    state = f"would go on: {found.num_rows:,} rows are committed already ({share:.1%} of the samples)"
    return cursor.input_shard, plan.num_samples - seen, state


def rehearse(
    shards: Sequence[InputShard], model: ImageTokenizer, options: TokenizeOptions, progress: Callable[[int], None]
) -> Rehearsal:
    """Encodes samples of some input shards in this process, as an encoder actor would.

    Args:
        shards: those with something to do.
        model: the tokenizer.
        options: see there.
        progress: called with the samples done.
    """
    keep_freed_memory()
    images = options.images.preprocessing(options.size, model.channels)
    device = (
        choose_device("auto") if options.cluster.address else options.device
    )  # this machine need not be like the cluster's
    encoder = SpanEncoder(packed(model), images, options.encoding, device, options.cluster.threads)
    tried = Rehearsal()
    shards = [shard for shard in shards if shard.num_samples]
    chosen = [shards[index * len(shards) // PLACES] for index in range(PLACES)] if len(shards) > PLACES else shards
    for number, shard in enumerate(chosen, 1):
        spans = encoder.spans(shard)
        wall, cpu = time.monotonic(), time.process_time()
        while tried.seconds < SECONDS * number / len(chosen) and (span := next(spans, None)):
            begun, cpu_begun = wall, cpu
            wall, cpu = time.monotonic(), time.process_time()
            tried.add(span, wall - begun, cpu - cpu_begun)
            progress(tried.seen)
    return tried


def _estimates(tried: Rehearsal, todo: int, spec: StoreSpec, options: TokenizeOptions) -> dict[str, Any]:
    rows = tried.rows / tried.seen * todo
    workers = options.workers or 1  # of a cluster that nobody has asked yet
    cores = workers * options.cluster.cpus_per_worker if options.cluster.address else None
    return {
        "rehearsed_samples": tried.seen,
        "rehearsed_reasons": dict(tried.reasons),
        "estimated_rows": round(rows),
        "estimated_bytes": round(rows * tried.row_bytes(spec)) if rows else 0,
        "estimated_seconds": round(tried.job_seconds(todo, workers, cores), 3),
    }


def _expected(tried: Rehearsal, todo: int, spec: StoreSpec, options: TokenizeOptions) -> list[str]:
    found = _estimates(tried, todo, spec, options)
    bad = ", ".join(f"{count:,} {reason}" for reason, count in sorted(tried.reasons.items()))
    return [
        f"{tried.seen:,} samples were encoded here to see: {tried.seen / tried.seconds:,.0f} a second in one worker; quarantined: {bad or 'none'}",
        f"so {todo:,} samples would take {'' if options.workers else 'one worker '}about {span_of_time(found['estimated_seconds'])} on machines like this one (and Ray's start), and give about "
        f"{found['estimated_rows']:,} rows in {found['estimated_bytes'] / 1e6:,.1f} MB",
    ]


def span_of_time(seconds: float) -> str:
    """Seconds as people say them.

    >>> [span_of_time(seconds) for seconds in (42.4, 600, 10_000, 400_000)]
    ['42 s', '10 min', '2.8 h', '4.6 days']
    """
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
