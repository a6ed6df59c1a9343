"""Sends a corpus through a tokenizer into a code store, on Ray: any number of workers, the same bytes, resumable, appendable.

Encoder actors pull input shards and stream spans of codes back in any order (spans.py); the driver sees only references and row counts,
cuts Zarr shards in corpus order, has writer tasks write them, and commits them one after the other (assembly.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from pipelines.assembly import extend, mend
from pipelines.cluster import ray_cluster
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.encoder import Encoding, describe_device
from pipelines.errors import RunFailed
from pipelines.foreign import packed, store_record
from pipelines.growth import Job, grows, planned_job
from pipelines.options import ImageFlags
from pipelines.outputs import require_room
from pipelines.shard_log import Note, shard_log
from pipelines.spans import Encoders
from pipelines.watch import Watch, Worker
from tokenizer.protocol import ImageTokenizer, level_specs
from vqmill.commits import Counts, Cursor, counts_of
from vqmill.layout import find_spec
from vqmill.places import Place, Where, place_of
from vqmill.spec import Segment, StoreSpec, default_rows_per_shard, usable_rows_per_shard
from vqmill.store import open_codes
from vqmill.writer import StoreWriter

Progress = Callable[[int, int, str], None]
SAMPLE_BYTES = 256  # what a row of the samples table takes on the disk without long captions


@dataclass(frozen=True)
class TokenizeOptions:
    """What shapes a store, beside corpus and tokenizer, and how many hands make it.

    Attributes:
        size: side of the square that images are made into, pixels.
        images: how they are.
        encoding: batch size and precision.
        rows_per_shard: rows of a Zarr shard, or a few more when these divide badly; None for the store's own rule.
        codec: how chunks are compressed; None for the smallest on the first Zarr shard.
        workers: encoder actors; never shapes the result.
        device: `cpu` or `cuda`.
    """

    size: int
    images: ImageFlags = field(default_factory=ImageFlags)
    encoding: Encoding = field(default_factory=Encoding)
    rows_per_shard: int | None = None
    codec: str | None = None
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class TokenizeResult:
    """The store's totals, and what this run added to them.

    Attributes:
        counts: input samples of the whole plan.
        rows: of the store.
        resumed_rows: of them, those that were committed before this run.
        appended_rows: those behind a store that was finished before; 0 when this run had nothing to append.
        mended: committed Zarr shards whose files were lost and were made again.
        did_something: whether the store was not finished already.
        reasons: quarantine lines by reason.
        retried: quarantined samples that this run tried again.
        still_bad: of them, the quarantine lines that say why they stay set aside: key, source, reason and detail.
        waiting: samples of the corpus behind those that a retry looks at.
        rows_per_shard: of the store.
        seconds: of this run.
        workers: what each encoder actor did.
        statistics: the file with a line for each input shard that this run came to the end of; empty when there was nothing to do.
    """

    counts: Counts
    rows: int
    resumed_rows: int
    appended_rows: int
    mended: tuple[int, ...]
    did_something: bool
    reasons: dict[str, int]
    rows_per_shard: int
    seconds: float
    workers: tuple[Worker, ...] = ()
    statistics: str = ""
    retried: int = 0
    still_bad: tuple[dict[str, str], ...] = ()
    waiting: int = 0


def store_spec(plan: Plan, model: ImageTokenizer, options: TokenizeOptions) -> StoreSpec:
    """The specification of the store that a job would make."""
    levels = level_specs(model, options.size)
    wanted = options.rows_per_shard
    rows_per_shard = usable_rows_per_shard(levels, wanted) if wanted else default_rows_per_shard(levels)
    return StoreSpec(
        levels=levels,
        rows_per_shard=rows_per_shard,
        tokenizer={
            **store_record(model),
            "computed_on": describe_device(options.device),
            **asdict(options.encoding),
        },
        preprocessing=_preprocessing(model, options).to_dict(),
        corpus={
            "description": plan.corpus,
            "num_samples": plan.num_samples - plan.num_retried,
            "class_names": list(plan.class_names or ()),
            "skipped": dict(plan.skipped),
        },
        segments=(Segment(plan.digest, 0, 0, len(plan.shards), plan.num_samples),),
        codec=options.codec,
    )


def _preprocessing(model: ImageTokenizer, options: TokenizeOptions) -> Preprocessing:
    return options.images.preprocessing(options.size, model.channels)


def tokenize_corpus(
    plan: Plan,
    model: ImageTokenizer,
    out: Where,
    options: TokenizeOptions,
    progress: Progress,
    started: Callable[[], None] = lambda: None,
    *,
    retry: bool = False,
) -> TokenizeResult:
    """Makes the store, goes on with it, or appends to it what the corpus has more.

    Args:
        plan: the corpus.
        model: the tokenizer.
        out: the store's folder or address.
        options: see there.
        progress: called with (samples done, samples in all, a note).
        started: called when there is work, before it begins.
        retry: instead, try again what a finished store has set aside, or go on with that; nothing is appended.

    Raises:
        UsageError: the place holds another store, is being written by another job, or has too little room.
        CodesError: the store is damaged, and the corpus does not give again what it has lost.
        RunFailed: an input shard keeps killing its worker, or a worker failed otherwise.
    """
    start = time.monotonic()
    place = place_of(out)
    found = find_spec(place)
    job = planned_job(plan, place, found, retry=retry)
    parts = job.parts
    if found:
        job.require_same(place, found, store_spec(parts[-1], model, options), parts[-1])
    # A ragged Zarr shard is written anew beside the old one.
    kept = found.num_rows - found.num_rows % found.rows_per_shard if found else 0
    row_bytes = store_spec(plan, model, options).row_bytes + SAMPLE_BYTES
    require_room(place, max(0, parts[-1].num_samples - kept) * row_bytes)
    worked = not (found and found.complete and len(parts[-1].shards) == found.segments[-1].input_shards)
    if worked:
        started()
    with shard_log(place) as (log, note):
        outcomes = [_carry_out(part, model, place, options, progress, note, job) for part in parts]
    codes = open_codes(place)
    quarantine = codes.quarantine()
    reasons = Counter(str(reason) for reason in quarantine["reason"].to_pylist())
    resumed, last = found.num_rows if found else 0, codes.spec.segments[-1]
    return TokenizeResult(
        outcomes[-1].counts + Counts(skipped=sum(plan.skipped.values())),
        rows=len(codes),
        resumed_rows=resumed,
        appended_rows=len(codes) - last.first_row if len(codes.spec.segments) > 1 and len(codes) > resumed else 0,
        mended=tuple(shard for outcome in outcomes for shard in outcome.mended),
        did_something=worked,
        reasons=dict(reasons),
        rows_per_shard=codes.spec.rows_per_shard,
        seconds=time.monotonic() - start,
        retried=last.retries if retry and worked else 0,
        still_bad=tuple(quarantine.select(["key", "source", "reason", "detail"]).to_pylist()) if retry else (),
        workers=tuple(worker for outcome in outcomes for worker in outcome.workers),
        statistics=str(log) if worked else "",
        waiting=plan.num_samples - (parts[-1].num_samples - parts[-1].num_retried) if retry else 0,
    )


@dataclass(frozen=True)
class _Outcome:
    """Counts of all commits of a plan that is brought to its end, and for this the Zarr shards that were made again, and the workers."""

    counts: Counts
    mended: list[int]
    workers: list[Worker]


def _carry_out(
    plan: Plan,
    model: ImageTokenizer,
    out: Place,
    options: TokenizeOptions,
    progress: Progress,
    note: Note,
    job: Job,
) -> _Outcome:
    """Brings a plan to its end, unless it is there already."""
    spec = store_spec(plan, model, options)
    found = find_spec(out)
    with StoreWriter(out, job.require_same(out, found, spec, plan) if found else spec) as writer:
        if found and job.retries:
            writer.grow(plan.digest, len(plan.shards), plan.num_samples, found.corpus, job.retries)
        elif found and grows(found, plan):
            writer.grow(plan.digest, len(plan.shards), plan.num_samples, spec.corpus)
        mended: list[int] = []
        workers: list[Worker] = []
        if not writer.spec.complete:
            mended = writer.missing_shards()
            with ray_cluster(options.workers, options.device):
                workers = _run(plan, model, writer, mended, options, progress, note)
            if writer.counts.seen != plan.num_samples:
                raise RunFailed(
                    f"{out.name}: {plan.num_samples:,} samples were planned, {writer.counts.seen:,} came out; the store is left unfinished."
                )
            writer.finish()
        return _Outcome(counts_of(writer.spec, writer.commits), mended, workers)


def _run(
    plan: Plan, model: ImageTokenizer, writer: StoreWriter, missing: list[int], options: TokenizeOptions, progress: Progress, note: Note
) -> list[Worker]:  # fmt: skip
    """Makes again what is missing of the committed Zarr shards, then encodes what is not committed; says what each worker did for that."""
    import ray

    from pipelines.remote import EncoderActor, RayHands

    gpus = 1 if options.device.startswith("cuda") else 0
    arguments = (ray.put(packed(model)), _preprocessing(model, options), options.encoding, options.device)
    encoders = Encoders(
        plan.shards,
        lambda: EncoderActor.options(num_cpus=1, num_gpus=gpus).remote(*arguments),
        options.workers,
        writer.spec.tokenizer["computed_on"],
    )
    hands, end = RayHands(), Cursor(len(plan.shards))
    before = writer.counts

    def again(done: int, total: int, note: str) -> None:
        progress(before.seen, plan.num_samples, f"making lost Zarr shards again; {note}")

    def watch(show: Progress, note: Note) -> Watch:
        return Watch(plan.shards, before, plan.num_samples, writer.spec.retried, show, note)

    mending, working = watch(again, lambda facts: None), watch(progress, note)
    mend(writer, missing, lambda start, stop: encoders.between(start, stop, mending), hands)
    working.show()
    extend(writer, encoders.between(writer.cursor, end, working), end.input_shard, hands)
    return working.workers
