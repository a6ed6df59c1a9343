"""Sends a corpus through a tokenizer into a code store, on Ray: any number of workers, the same bytes, resumable, appendable.

Encoder actors pull input shards and stream spans of codes back in any order (spans.py); the driver sees only references and row counts,
cuts Zarr shards in corpus order, has writer tasks write them, and commits them one after the other (assembly.py).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from pipelines.assembly import ArrivedSpan, extend, mend
from pipelines.careful import SAMPLE_TIMEOUT
from pipelines.cluster import WORKER_ENVIRONMENT, Crew, ray_crew
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.encoder import Encoding, describe_device
from pipelines.errors import RunFailed, WriteLost
from pipelines.fleet import Fleet, Kinds
from pipelines.foreign import packed, store_record
from pipelines.growth import Job, grows, planned_job
from pipelines.options import ClusterFlags, ImageFlags
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
MAX_LOSSES = 3  # one after the other, without a commit in between; then it is not for lost machines
SAMPLE_BYTES = 256  # what a row of the samples table takes on the disk without long captions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeOptions:
    """What shapes a store, beside corpus and tokenizer, and how many hands make it.

    Attributes:
        size: side of the square that images are made into, pixels.
        images: how they are.
        encoding: batch size, precision, and whether networks are compiled.
        rows_per_shard: rows of a Zarr shard, or a few more when these divide badly; None for the store's own rule.
        codec: how chunks are compressed; None for the smallest on the first Zarr shard.
        sample_timeout: seconds that decoding an image may take.
        workers: encoder actors; never shapes the result. None for as many as a cluster that is joined has room for.
        device: `cpu` or `cuda`; of a cluster that is joined also `auto`.
        cluster: where they run; but for `allow_mixed`, never shapes the result.
    """

    size: int
    images: ImageFlags = field(default_factory=ImageFlags)
    encoding: Encoding = field(default_factory=Encoding)
    rows_per_shard: int | None = None
    codec: str | None = None
    sample_timeout: int = SAMPLE_TIMEOUT
    workers: int | None = 1
    device: str = "cpu"
    cluster: ClusterFlags = field(default_factory=ClusterFlags)


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
        workers: what each encoder actor did, since machines were last lost with spans that were to be written.
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


def store_spec(
    plan: Plan, model: ImageTokenizer, options: TokenizeOptions, found: StoreSpec | None = None
) -> StoreSpec:
    """The specification of the store that a job would make, where `found` is."""
    levels = level_specs(model, options.size)
    wanted = options.rows_per_shard
    rows_per_shard = usable_rows_per_shard(levels, wanted) if wanted else default_rows_per_shard(levels)
    return StoreSpec(
        levels=levels,
        rows_per_shard=rows_per_shard,
        tokenizer={
            **store_record(model),
            "computed_on": _computed_on(options, found),
            **options.encoding.to_dict(),
            **({"sample_timeout_seconds": options.sample_timeout} if options.sample_timeout != SAMPLE_TIMEOUT else {}),
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


def _computed_on(options: TokenizeOptions, found: StoreSpec | None) -> str:
    """What the store says of machines before the workers do, which are held against it: see `fleet.Kinds`."""
    recorded = str(found.tokenizer.get("computed_on", "")) if found else ""
    if options.cluster.address or (found and (options.cluster.allow_mixed or not recorded)):
        return recorded
    return describe_device(options.device)


def require_room_for(plan: Plan, place: Place, row_bytes: int, found: StoreSpec | None) -> None:
    """Refuses a job whose store would not fit on its disk.

    Raises:
        UsageError: there is too little room for what is not committed yet.
    """
    # A ragged Zarr shard is written anew beside the old one.
    kept = found.num_rows - found.num_rows % found.rows_per_shard if found else 0
    require_room(place, max(0, plan.num_samples - kept) * (row_bytes + SAMPLE_BYTES))


def _preprocessing(model: ImageTokenizer, options: TokenizeOptions) -> Preprocessing:
    return options.images.preprocessing(options.size, model.channels)


def tokenize_corpus(
    plan: Plan,
    model: ImageTokenizer,
    out: Where,
    options: TokenizeOptions,
    progress: Progress,
    started: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
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
        say: called with which Ray is used.
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
        job.require_same(place, found, store_spec(parts[-1], model, options, found), parts[-1])
    require_room_for(parts[-1], place, store_spec(plan, model, options).row_bytes, found)
    worked = not (found and found.complete and len(parts[-1].shards) == found.segments[-1].input_shards)
    if worked:
        started()
    with shard_log(place) as (statistics, note):
        outcomes = [_carry_out(part, model, place, options, progress, say, note, job) for part in parts]
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
        statistics=str(statistics) if worked else "",
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
    say: Callable[[str], None],
    note: Note,
    job: Job,
) -> _Outcome:
    """Brings a plan to its end, unless it is there already."""
    found = find_spec(out)
    spec = store_spec(plan, model, options, found)
    with StoreWriter(out, job.require_same(out, found, spec, plan) if found else spec) as writer:
        if found and job.retries:
            writer.grow(plan.digest, len(plan.shards), plan.num_samples, found.corpus, job.retries)
        elif found and grows(found, plan):
            writer.grow(plan.digest, len(plan.shards), plan.num_samples, spec.corpus)
        mended: list[int] = []
        workers: list[Worker] = []
        if not writer.spec.complete:
            mended = writer.missing_shards()
            cluster = options.cluster
            with ray_crew(options.workers, options.device, cluster.share, cluster.address) as crew:
                say(crew.summary)
                workers = _run(plan, model, writer, mended, options, progress, note, crew)
            if writer.counts.seen != plan.num_samples:
                raise RunFailed(
                    f"{out.name}: {plan.num_samples:,} samples were planned, {writer.counts.seen:,} came out; the store is left unfinished."
                )
            writer.finish()
        return _Outcome(counts_of(writer.spec, writer.commits), mended, workers)


def _run(
    plan: Plan, model: ImageTokenizer, writer: StoreWriter, missing: list[int], options: TokenizeOptions, progress: Progress, note: Note, crew: Crew
) -> list[Worker]:  # fmt: skip
    """Makes again what is missing of the committed Zarr shards, then encodes what is not committed.

    When machines are lost with spans that were to be written, begins anew behind the last commit. Says what each worker did since then.
    """
    losses, committed = 0, writer.cursor
    while True:
        try:
            return _try(plan, model, writer, missing, options, progress, note, crew)
        except WriteLost as error:
            log.warning("%s; encoding again what is not committed", error)
            losses = losses + 1 if writer.cursor == committed else 1
            if losses == MAX_LOSSES:
                raise
            committed, missing = writer.cursor, writer.missing_shards()


def _try(
    plan: Plan, model: ImageTokenizer, writer: StoreWriter, missing: list[int], options: TokenizeOptions, progress: Progress, note: Note, crew: Crew
) -> list[Worker]:  # fmt: skip
    from pipelines.remote import RayHands

    hands, end = RayHands(writer.store), Cursor(len(plan.shards))
    before = writer.counts

    def again(done: int, total: int, note: str) -> None:
        progress(before.seen, plan.num_samples, f"making lost Zarr shards again; {note}")

    def watch(show: Progress, note: Note) -> Watch:
        return Watch(plan.shards, before, plan.num_samples, writer.spec.retried, show, note)

    mending, working = watch(again, lambda facts: None), watch(progress, note)
    with ExitStack() as stack:  # actors end with it, at work or not
        encoders = Encoders(plan.shards, _fleet(plan, model, writer, options, crew), crew.workers)
        stack.callback(encoders.close)

        def spans(start: Cursor, stop: Cursor, watch: Watch) -> Iterable[ArrivedSpan]:
            return stack.enter_context(closing(encoders.between(start, stop, watch)))

        mend(writer, missing, lambda start, stop: spans(start, stop, mending), hands)
        working.show()
        extend(writer, spans(writer.cursor, end, working), end.input_shard, hands)
    return working.workers


def _fleet(plan: Plan, model: ImageTokenizer, writer: StoreWriter, options: TokenizeOptions, crew: Crew) -> Fleet:
    """What starts encoder actors, as asked for."""
    import ray

    from pipelines.remote import EncoderActor

    arguments = (
        ray.put(packed(model)), _preprocessing(model, options), options.encoding, crew.device, options.cluster.threads, options.sample_timeout,
    )  # fmt: skip
    actor = EncoderActor.options(
        num_cpus=crew.resources["CPU"],
        num_gpus=crew.resources.get("GPU", 0),
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    kinds = Kinds(writer.spec.tokenizer["computed_on"], writer.record_machines, mixed=options.cluster.allow_mixed)
    first = next(iter(plan.shards), None)
    return Fleet(lambda: actor.remote(*arguments), kinds, first.first_file if first else None)
