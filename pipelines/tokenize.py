"""Sends a corpus through a tokenizer into a code store, on Ray: any number of workers, the same bytes, resumable.

Encoder actors pull input shards and stream spans of codes back in any order; the driver sees only references and row counts, cuts Zarr
shards in corpus order, has writer tasks write them, and commits them one after the other.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizer
from pipelines.cluster import ray_cluster
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.encoder import SPAN_SAMPLES, Encoding, describe_device
from pipelines.errors import RunFailed
from pipelines.ordering import ShardCutter, ShardJob
from pipelines.outputs import require_room
from vqmill.layout import read_spec
from vqmill.spec import LevelSpec, Segment, StoreSpec, default_rows_per_shard
from vqmill.store import open_codes
from vqmill.writer import Counts, StoreWriter

if TYPE_CHECKING:
    from pipelines.remote import SpanFacts

SAMPLE_BYTES = 256  # what a row of the samples table takes on the disk without long captions
WINDOW = 4  # input shards in flight for each actor: bounds what waits for its turn
MAX_WAITING_SPANS = 64  # of an input shard whose turn has not come; beyond, its actor is left to wait
MAX_WRITES = 4  # Zarr shards being written at a time
MAX_DEATHS = 3  # a span that killed its actor so often stops the job


@dataclass(frozen=True)
class TokenizeOptions:
    """What shapes a store, beside corpus and tokenizer, and how many hands make it.

    Attributes:
        size: side of the square that images are resized and cropped to, pixels.
        encoding: batch size and precision.
        rows_per_shard: rows of a Zarr shard; None for the store's own rule.
        workers: encoder actors; never shapes the result.
        device: `cpu` or `cuda`.
    """

    size: int
    encoding: Encoding = field(default_factory=Encoding)
    rows_per_shard: int | None = None
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class TokenizeResult:
    """The store's totals, and what this run added to them."""

    counts: Counts
    rows: int
    resumed_rows: int
    reasons: dict[str, int]
    seconds: float


def store_spec(plan: Plan, model: tokenizer.Tokenizer, options: TokenizeOptions) -> StoreSpec:
    """The specification of the store that a job would make."""
    levels = tuple(
        LevelSpec(name, model.config.codebook_size, model.config.grid(name, options.size))
        for name in model.config.level_names
    )
    rows_per_shard = options.rows_per_shard or default_rows_per_shard(levels)
    return StoreSpec(
        levels=levels,
        rows_per_shard=rows_per_shard,
        tokenizer={
            "fingerprint": model.fingerprint,
            "preset": model.config.preset,
            "computed_on": describe_device(options.device),
            **asdict(options.encoding),
        },
        preprocessing=_preprocessing(model, options).to_dict(),
        corpus={
            "description": plan.corpus,
            "num_samples": plan.num_samples,
            "class_names": list(plan.class_names or ()),
            "skipped": dict(plan.skipped),
        },
        segments=(Segment(plan.digest),),
    )


def _preprocessing(model: tokenizer.Tokenizer, options: TokenizeOptions) -> Preprocessing:
    return Preprocessing(size=options.size, channels=model.config.channels)


def tokenize_corpus(
    plan: Plan,
    model: tokenizer.Tokenizer,
    out: Path,
    options: TokenizeOptions,
    progress: Callable[[int, int, str], None],
) -> TokenizeResult:
    """Makes the store, or goes on with it.

    Args:
        plan: the corpus.
        model: the tokenizer.
        out: the store's folder.
        options: see there.
        progress: called with (samples done, samples in all, a note).

    Raises:
        UsageError: the place holds another store, is being written by another job, or has too little room.
        RunFailed: an input shard keeps killing its worker, or a worker failed otherwise.
    """
    start = time.monotonic()
    spec = store_spec(plan, model, options)
    committed = read_spec(out).num_rows if (out / "zarr.json").exists() else 0
    require_room(out, (plan.num_samples - committed) * (spec.row_bytes + SAMPLE_BYTES))
    with StoreWriter(out, spec) as writer:
        resumed = writer.spec.num_rows
        if not writer.spec.complete:
            with ray_cluster(options.workers, options.device):
                _Driver(plan, model, writer, options, progress).run()
            if writer.counts.seen != plan.num_samples:
                raise RunFailed(
                    f"{out}: {plan.num_samples:,} samples were planned, {writer.counts.seen:,} came out; the store is left unfinished."
                )
            writer.finish()
        counts = writer.counts + Counts(skipped=sum(plan.skipped.values()))
        rows = writer.spec.num_rows
    reasons = Counter(str(reason) for reason in open_codes(out).quarantine()["reason"].to_pylist())
    return TokenizeResult(counts, rows, resumed, dict(reasons), time.monotonic() - start)


@dataclass
class _Running:
    """An input shard on an actor."""

    unit: int
    actor: Any
    next_span: int


@dataclass
class _Write:
    """A Zarr shard on its way to the disk."""

    job: ShardJob[Any]
    files: Any


class _Driver:
    """One run: hands out input shards, puts spans in order, commits."""

    def __init__(
        self, plan: Plan, model: tokenizer.Tokenizer, writer: StoreWriter, options: TokenizeOptions,
        progress: Callable[[int, int, str], None],
    ) -> None:  # fmt: skip
        import ray

        from pipelines import remote

        self._ray, self._remote = ray, remote
        self._plan, self._writer, self._options, self._progress = plan, writer, options, progress
        gpus = 1 if options.device.startswith("cuda") else 0
        preprocessing = _preprocessing(model, options)
        arguments = (ray.put(tokenizer.dumps(model)), preprocessing, options.encoding, options.device)
        self._new_actor = lambda: remote.EncoderActor.options(num_cpus=1, num_gpus=gpus).remote(*arguments)
        cursor = writer.cursor
        self._cutter: ShardCutter[Any] = ShardCutter(writer.spec.rows_per_shard, writer.spec.num_commits, cursor)
        self._current = self._next_unit = cursor.input_shard
        self._first_span = {cursor.input_shard: cursor.span}
        self._running: dict[Any, _Running] = {}
        self._arrived: dict[int, deque[tuple[SpanFacts, Any]]] = {}
        self._ended: set[int] = set()
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._seen: Counter[int] = Counter()
        self._again: list[tuple[int, int]] = []
        self._writes: deque[_Write] = deque()
        # What the committed rows stand for, plus the samples of a half-committed span, which are counted when it ends.
        self._done = writer.counts.seen
        self._bad = writer.counts.quarantined

    def run(self) -> None:
        """Encodes what is missing."""
        units = len(self._plan.shards)
        if self._current >= units:
            return
        workers = min(self._options.workers, units - self._current)
        idle = [self._new_actor() for _ in range(workers)]
        self._refuse_mixed_devices(idle)
        self._report()
        while self._current < units:
            self._assign(idle, units)
            self._receive(idle)
            self._put_in_order(units)
        for job in self._cutter.finish(units):
            self._write(job)
        while self._writes:
            self._commit_head()

    def _refuse_mixed_devices(self, actors: list[Any]) -> None:
        try:
            kinds = {
                self._writer.spec.tokenizer["computed_on"],
                *self._ray.get([actor.describe.remote() for actor in actors]),
            }
        except self._ray.exceptions.RayError as error:
            raise RunFailed(f"an encoder worker did not start: {str(error).strip().splitlines()[-1]}") from error
        if len(kinds) > 1:
            raise RunFailed(
                f"the machines differ ({'; '.join(sorted(kinds))}), and so might their codes. Run on machines of one kind."
            )

    def _assign(self, idle: list[Any], units: int) -> None:
        while idle:
            if self._again:
                unit, span = self._again.pop(0)
            elif self._next_unit < min(units, self._current + WINDOW * self._options.workers):
                unit, span = self._next_unit, self._first_span.get(self._next_unit, 0)
                self._next_unit += 1
            else:
                return
            actor = idle.pop()
            stream = actor.encode.options(num_returns="streaming", _generator_backpressure_num_objects=16).remote(
                self._plan.shards[unit], span
            )
            self._running[stream] = _Running(unit, actor, span)

    def _receive(self, idle: list[Any]) -> None:
        """Waits for a span, the end of an input shard, or a written Zarr shard."""
        wanted = [stream for stream, task in self._running.items() if self._has_room(task.unit)]
        ready, _ = self._ray.wait([*wanted, *(write.files for write in list(self._writes)[:1])], fetch_local=False)
        for item in ready:
            if item not in self._running:
                self._commit_head()
                continue
            task = self._running[item]
            try:
                facts, span = self._next_span(item)
            except StopIteration:
                del self._running[item]
                self._require_whole(task)
                self._ended.add(task.unit)
                idle.append(task.actor)
            except self._ray.exceptions.RayTaskError as error:
                name = self._plan.shards[task.unit].name
                raise RunFailed(
                    f"input shard {name} (number {task.unit}): the encoder failed: {error.cause!r}"
                ) from error
            except self._ray.exceptions.RayError as error:
                del self._running[item]
                self._bury(task, error)
                idle.append(self._new_actor())
            else:
                task.next_span = facts.index + 1
                self._seen[task.unit] += facts.counts.seen
                self._arrived.setdefault(task.unit, deque()).append((facts, span))
                self._done += facts.counts.seen
                self._bad += facts.counts.quarantined
                self._report()

    def _has_room(self, unit: int) -> bool:
        return unit == self._current or len(self._arrived.get(unit, ())) < MAX_WAITING_SPANS

    def _require_whole(self, task: _Running) -> None:
        """An input shard that ends has given every sample that was planned."""
        shard = self._plan.shards[task.unit]
        found = self._seen.pop(task.unit, 0) + SPAN_SAMPLES * self._first_span.get(task.unit, 0)
        if found != shard.num_samples:
            raise RunFailed(
                f"input shard {shard.name} (number {task.unit}) gave {found} samples, {shard.num_samples} were planned. Run the same command again."
            )

    def _next_span(self, stream: Any) -> tuple[SpanFacts, Any]:
        span = next(stream)
        try:
            return self._ray.get(next(stream)), span
        except StopIteration:
            self._ray.get(span)  # the stream broke at the span itself: this raises why
            raise

    def _bury(self, task: _Running, error: Exception) -> None:
        """An actor died: its input shard goes to a new one, from the first span that did not arrive."""
        self._deaths[task.unit, task.next_span] += 1
        deaths = self._deaths[task.unit, task.next_span]
        if deaths == MAX_DEATHS:
            first = task.next_span * SPAN_SAMPLES
            raise RunFailed(
                f"input shard {self._plan.shards[task.unit].name} (number {task.unit}) killed its worker {deaths} times, at samples "
                f"{first}..{first + SPAN_SAMPLES - 1} of it. What was committed is safe. Take the shard out of the corpus, or mend it. ({error})"
            )
        self._again.append((task.unit, task.next_span))

    def _put_in_order(self, units: int) -> None:
        while self._current < units:
            arrived = self._arrived.get(self._current, deque())
            while arrived:
                facts, span = arrived.popleft()
                for job in self._cutter.add(self._current, facts.index, facts.rows, facts.counts, span):
                    self._write(job)
            if self._current not in self._ended:
                return
            self._arrived.pop(self._current, None)
            self._current += 1

    def _write(self, job: ShardJob[Any]) -> None:
        while len(self._writes) >= MAX_WRITES:
            self._commit_head()
        pieces = [(piece.first, piece.stop, piece.ends_span) for piece in job.pieces]
        spans = [piece.payload for piece in job.pieces]
        files = self._remote.write_pieces.remote(
            self._writer.store.absolute(), self._writer.spec, job.shard, pieces, *spans
        )
        job.pieces.clear()  # the task holds the spans now; they are freed when it is done
        self._writes.append(_Write(job, files))

    def _commit_head(self) -> None:
        write = self._writes.popleft()
        try:
            files = self._ray.get(write.files)
        except self._ray.exceptions.RayError as error:
            raise RunFailed(
                f"Zarr shard {write.job.shard} could not be written: {error}. What was committed before is safe."
            ) from error
        self._writer.commit(write.job.rows, write.job.cursor, write.job.counts, files)

    def _report(self) -> None:
        bad = f"{self._bad:,} quarantined" if self._bad else ""
        self._progress(self._done, self._plan.num_samples, bad)
