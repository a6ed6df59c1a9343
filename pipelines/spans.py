"""Encoder actors at work: hands out input shards, and gives the spans that come back in corpus order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.assembly import ArrivedSpan, SpanFacts
from pipelines.corpus.plan import InputShard
from pipelines.encoder import SPAN_SAMPLES
from pipelines.errors import RunFailed
from pipelines.watch import Watch
from vqmill.commits import Cursor
from vqmill.errors import CodesError

WINDOW = 4  # input shards in flight for each actor: bounds what waits for its turn
MAX_WAITING_SPANS = 64  # of an input shard whose turn has not come; beyond, its actor is left to wait
MAX_DEATHS = 3  # a span that killed its actor so often stops the job


class Encoders:
    """Actors that encode, started when there is work for them."""

    def __init__(
        self, shards: Sequence[InputShard], start_actor: Callable[[], Any], workers: int, computed_on: str
    ) -> None:
        """Takes note; starts nothing.

        Args:
            shards: the plan's.
            start_actor: gives a new `remote.EncoderActor`.
            workers: how many to start at most.
            computed_on: the kind of device that must encode, as `encoder.describe_device` names it.
        """
        self._shards, self._start_actor, self._workers, self._computed_on = shards, start_actor, workers, computed_on
        self._actors: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def between(self, start: Cursor, stop: Cursor, watch: Watch) -> Iterator[ArrivedSpan]:
        """Encodes from one cursor to another; of a span in which `stop` lies, all.

        Args:
            start: the first span wanted.
            stop: the first one not wanted, unless it has rows before `stop`.
            watch: is told what the actors do.

        Raises:
            RunFailed: an input shard keeps killing its worker, a worker failed otherwise, or machines are of different kinds.
        """
        stop_span = stop.span + bool(stop.row)
        units = stop.input_shard + bool(stop_span)
        if start.input_shard < units:
            self._staff(min(self._workers, units - start.input_shard))
            watch.hired(len(self._actors))
            limits = {stop.input_shard: stop_span} if stop_span else {}
            window = WINDOW * self._workers
            yield from _Range(
                self._shards, self._actors, self._numbers, self._start_actor, window, start, units, limits, watch
            ).run()

    def _staff(self, wanted: int) -> None:
        import ray
        from ray.exceptions import RayError

        new = [self._start_actor() for _ in range(wanted - len(self._actors))]
        try:
            kinds = {self._computed_on, *ray.get([actor.describe.remote() for actor in new])}
        except RayError as error:
            raise RunFailed(f"an encoder worker did not start: {str(error).strip().splitlines()[-1]}") from error
        if len(kinds) > 1:
            raise RunFailed(
                f"the machines differ ({'; '.join(sorted(kinds))}), and so might their codes. Run on machines of one kind."
            )
        self._numbers |= {actor: number for number, actor in enumerate(new, len(self._actors))}
        self._actors += new


@dataclass
class _Running:
    """An input shard on an actor."""

    unit: int
    actor: Any
    next_span: int


@dataclass
class _Range:
    """One stretch of the corpus under way.

    Attributes:
        shards: the plan's input shards.
        idle: actors without work; all of them again at the end.
        numbers: of actors; who takes a dead one's place takes its number.
        start_actor: replaces one that died.
        window: input shards in flight.
        start: the first span.
        units: the first input shard not wanted.
        limits: the first span not wanted, of an input shard that is not encoded to its end.
        watch: see `Encoders.between`.
    """

    shards: Sequence[InputShard]
    idle: list[Any]
    numbers: dict[Any, int]
    start_actor: Callable[[], Any]
    window: int
    start: Cursor
    units: int
    limits: dict[int, int]
    watch: Watch
    running: dict[Any, _Running] = field(default_factory=dict[Any, _Running])
    arrived: dict[int, deque[ArrivedSpan]] = field(default_factory=dict[int, deque[ArrivedSpan]])
    ended: set[int] = field(default_factory=set[int])
    deaths: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    seen: Counter[int] = field(default_factory=Counter[int])
    again: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __post_init__(self) -> None:
        self.current = self.next_unit = self.start.input_shard

    def run(self) -> Iterator[ArrivedSpan]:
        while self.current < self.units:
            self._assign()
            self._receive()
            yield from self._in_order()

    def _first_span(self, unit: int) -> int:
        return self.start.span if unit == self.start.input_shard else 0

    def _assign(self) -> None:
        while self.idle:
            if self.again:
                unit, span = self.again.pop(0)
            elif self.next_unit < min(self.units, self.current + self.window):
                unit, span = self.next_unit, self._first_span(self.next_unit)
                self.next_unit += 1
            else:
                return
            actor = self.idle.pop()
            encode = actor.encode.options(num_returns="streaming", _generator_backpressure_num_objects=16)
            stream = encode.remote(self.shards[unit], span, self.limits.get(unit))
            self.running[stream] = _Running(unit, actor, span)
            self.watch.began(self.numbers[actor], unit, span)

    def _receive(self) -> None:
        """Waits for a span, or for the end of an input shard."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        wanted = [stream for stream, task in self.running.items() if self._has_room(task.unit)]
        for stream in ray.wait(wanted, fetch_local=False)[0]:
            task = self.running[stream]
            try:
                facts, span = _next_span(stream)
            except StopIteration:
                del self.running[stream]
                self._require_whole(task)
                self.ended.add(task.unit)
                self.idle.append(task.actor)
                self.watch.ended(self.numbers[task.actor], task.unit)
            except RayTaskError as error:
                name = self.shards[task.unit].name
                kind = CodesError if isinstance(error.cause, CodesError) else RunFailed  # it would come again
                raise kind(f"input shard {name} (number {task.unit}): the encoder failed: {error.cause!r}") from error
            except RayError as error:
                del self.running[stream]
                self._bury(task, error)
                self.idle.append(actor := self.start_actor())
                self.numbers[actor] = self.numbers.pop(task.actor)
            else:
                task.next_span = facts.index + 1
                self.seen[task.unit] += facts.counts.seen
                self.arrived.setdefault(task.unit, deque()).append(ArrivedSpan(task.unit, facts, span))
                self.watch.arrived(self.numbers[task.actor], task.unit, facts)

    def _has_room(self, unit: int) -> bool:
        return unit == self.current or len(self.arrived.get(unit, ())) < MAX_WAITING_SPANS

    def _require_whole(self, task: _Running) -> None:
        """An input shard that ends has given every sample that was planned, up to the span where it was to stop."""
        shard = self.shards[task.unit]
        planned = min(shard.num_samples, SPAN_SAMPLES * self.limits.get(task.unit, shard.num_samples))
        found = self.seen.pop(task.unit, 0) + SPAN_SAMPLES * self._first_span(task.unit)
        if found != planned:
            raise RunFailed(
                f"input shard {shard.name} (number {task.unit}) gave {found} samples, {planned} were planned. Run the same command again."
            )

    def _bury(self, task: _Running, error: Exception) -> None:
        """An actor died: its input shard goes to a new one, from the first span that did not arrive."""
        self.watch.died(self.numbers[task.actor], task.unit)
        self.deaths[task.unit, task.next_span] += 1
        deaths = self.deaths[task.unit, task.next_span]
        if deaths == MAX_DEATHS:
            first = task.next_span * SPAN_SAMPLES
            raise RunFailed(
                f"input shard {self.shards[task.unit].name} (number {task.unit}) killed its worker {deaths} times, at samples "
                f"{first}..{first + SPAN_SAMPLES - 1} of it. What was committed is safe. Take the shard out of the corpus, or mend it. ({error})"
            )
        self.again.append((task.unit, task.next_span))

    def _in_order(self) -> Iterator[ArrivedSpan]:
        while self.current < self.units:
            arrived = self.arrived.get(self.current, deque())
            while arrived:
                yield arrived.popleft()
            if self.current not in self.ended:
                return
            self.arrived.pop(self.current, None)
            self.current += 1


def _next_span(stream: Any) -> tuple[SpanFacts, Any]:
    import ray

    span = next(stream)
    try:
        facts: Any = ray.get(next(stream))
        return facts, span
    except StopIteration:
        ray.get(span)  # the stream broke at the span itself: this raises why
        raise
