"""Encoder actors at work: hands out input shards, and gives the spans that come back in corpus order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pipelines.assembly import ArrivedSpan, SpanFacts
from pipelines.corpus.plan import InputShard
from pipelines.encoder import SPAN_SAMPLES
from pipelines.errors import RunFailed
from pipelines.fleet import Fleet
from pipelines.watch import Watch
from vqmill.commits import Cursor
from vqmill.errors import CodesError

WINDOW = 4  # input shards in flight for each actor: bounds what waits for its turn
MAX_WAITING_SPANS = 64  # of an input shard whose turn has not come; beyond, its actor is left to wait
WAITING_SECONDS = 10.0  # without anything new, until that is told
STUCK = 6  # times in a row that all who work wait for an actor that does not start, until one gives up its place
MAX_DEATHS = 3  # a span that killed its actor so often, all but once in careful mode, stops the job
CAREFUL_SPANS = 2  # after a death: the span that did not arrive, and the one that was decoded ahead of it


class Encoders:
    """Actors that encode, started when there is work for them."""

    def __init__(self, shards: Sequence[InputShard], fleet: Fleet, workers: int) -> None:
        """Takes note; starts nothing.

        Args:
            shards: the plan's.
            fleet: starts actors.
            workers: how many to start at most.
        """
        self._shards, self._fleet, self._workers = shards, fleet, workers
        self._actors: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def between(self, start: Cursor, stop: Cursor, watch: Watch) -> Generator[ArrivedSpan, None, None]:
        """Encodes from one cursor to another; of a span in which `stop` lies, all.

        Args:
            start: the first span wanted.
            stop: the first one not wanted, unless it has rows before `stop`.
            watch: is told what the actors do.

        Returns:
            The spans in corpus order. Who wants no more of them closes it.

        Raises:
            RunFailed: an input shard keeps killing its worker, a worker failed otherwise or did not start, or machines differ.
        """
        stop_span = stop.span + bool(stop.row)
        units = stop.input_shard + bool(stop_span)
        if start.input_shard < units:
            self._staff(min(self._workers, units - start.input_shard))
            watch.hired(1 + max(self._numbers.values(), default=-1))
            limits = {stop.input_shard: stop_span} if stop_span else {}
            window = WINDOW * self._workers
            yield from _Range(
                self._shards, self._actors, self._numbers, self._fleet, window, start, units, limits, watch
            ).run()

    def close(self) -> None:
        """Ends the actors that are idle or starting; those at work end when what `between` gave is closed."""
        import ray

        for actor in (*self._actors, *self._fleet.starting.values()):
            ray.kill(actor)

    def _staff(self, wanted: int) -> None:
        self._fleet.start(wanted - len(self._actors) - len(self._fleet.starting))


@dataclass
class _Running:
    """An input shard on an actor, from a span to `stop_span`."""

    unit: int
    actor: Any
    next_span: int
    stop_span: int


@dataclass
class _Range:
    """One stretch of the corpus under way.

    Attributes:
        shards: the plan's input shards.
        idle: actors without work; all of them again at the end.
        numbers: of actors; who takes a dead one's place takes its number.
        fleet: brings actors that have started, and replaces one that died.
        window: input shards in flight.
        start: the first span.
        units: the first input shard not wanted.
        limits: the first span not wanted, of an input shard that is not encoded to its end.
        watch: see `Encoders.between`.
    """

    shards: Sequence[InputShard]
    idle: list[Any]
    numbers: dict[Any, int]
    fleet: Fleet
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
    stuck: int = 0

    def __post_init__(self) -> None:
        self.current = self.next_unit = self.start.input_shard

    def run(self) -> Generator[ArrivedSpan, None, None]:
        import ray

        try:
            while self.current < self.units:
                self._assign()
                self._receive()
                yield from self._in_order()
        finally:  # nobody wants the rest
            for task in self.running.values():
                ray.kill(task.actor)

    def _first_span(self, unit: int) -> int:
        return self.start.span if unit == self.start.input_shard else 0

    def _stop_span(self, unit: int) -> int:
        return self.limits.get(unit, -(-self.shards[unit].num_samples // SPAN_SAMPLES))

    def _assign(self) -> None:
        while self.idle:
            if self.again:
                unit, span = min(self.again)
                self.again.remove((unit, span))
            elif self.next_unit < min(self.units, self.current + self.window):
                unit, span = self.next_unit, self._first_span(self.next_unit)
                self.next_unit += 1
            else:
                return
            actor = self.idle.pop()
            careful, stop = self.deaths[unit, span] > 0, self._stop_span(unit)
            if careful:
                stop = min(stop, span + CAREFUL_SPANS)
            encode = actor.encode.options(num_returns="streaming", _generator_backpressure_num_objects=16)
            stream = encode.remote(self.shards[unit], span, stop, careful=careful)
            self.running[stream] = _Running(unit, actor, span, stop)
            self.watch.began(self.numbers[actor], unit, span)

    def _receive(self) -> None:
        """Waits for a span, for the end of an input shard, or for an actor that has started."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        wanted = [stream for stream, task in self.running.items() if self._has_room(task.unit)]
        self.watch.starting = len(self.fleet.starting)
        ready = ray.wait([*self.fleet.starting, *wanted], timeout=WAITING_SECONDS, fetch_local=False)[0]
        self.stuck = 0 if ready or wanted else self.stuck + 1
        if not ready:
            self._explain(wanted)
        for stream in ready:
            if stream in self.fleet.starting:
                self._employ(self.fleet.welcome(stream))
                continue
            task = self.running[stream]
            try:
                facts, span = _next_span(stream)
            except StopIteration:
                del self.running[stream]
                self.idle.append(task.actor)
                if task.next_span == task.stop_span < self._stop_span(task.unit):  # what was to be done carefully is
                    self.again.append((task.unit, task.next_span))
                    self.watch.left(self.numbers[task.actor])
                else:
                    self._require_whole(task)
                    self.ended.add(task.unit)
                    self.watch.ended(self.numbers[task.actor], task.unit)
            except RayTaskError as error:
                name = self.shards[task.unit].name
                kind = CodesError if isinstance(error.cause, CodesError) else RunFailed  # it would come again
                raise kind(f"input shard {name} (number {task.unit}): the encoder failed: {error.cause!r}") from error
            except RayError as error:
                del self.running[stream]
                self._bury(task, error)
                del self.numbers[task.actor]
                self.fleet.start()
            else:
                task.next_span = facts.index + 1
                self.seen[task.unit] += facts.counts.seen
                self.arrived.setdefault(task.unit, deque()).append(ArrivedSpan(task.unit, facts, span))
                self.watch.arrived(self.numbers[task.actor], task.unit, facts)

    def _explain(self, wanted: list[Any]) -> None:
        """Nothing has come for a while: the display says for whom all wait."""
        for stream, task in self.running.items():
            if stream not in wanted:
                self.watch.held_back(self.numbers[task.actor])
        if self.stuck >= STUCK and self.running:
            self._make_place()
        self.watch.show()

    def _make_place(self) -> None:
        """All that work wait for an input shard whose actor was lost and finds no room to start again: the last of them gives up its own."""
        self.stuck = 0
        stream = max(self.running, key=lambda stream: self.running[stream].unit)
        task = self.running.pop(stream)
        self.fleet.dismiss(task.actor)
        self.watch.left(self.numbers.pop(task.actor))
        self.again.append((task.unit, task.next_span))
        self.fleet.start()

    def _employ(self, actors: list[Any]) -> None:
        for actor in actors:
            taken = set(self.numbers.values())
            self.numbers[actor] = next(number for number in count() if number not in taken)
            self.watch.hired(self.numbers[actor] + 1)
            self.idle.append(actor)

    def _has_room(self, unit: int) -> bool:
        return unit == self.current or len(self.arrived.get(unit, ())) < MAX_WAITING_SPANS

    def _require_whole(self, task: _Running) -> None:
        """An input shard that ends has given every sample that was planned, up to the span where it was to stop."""
        shard = self.shards[task.unit]
        planned = min(shard.num_samples, SPAN_SAMPLES * self._stop_span(task.unit))
        found = self.seen.pop(task.unit, 0) + SPAN_SAMPLES * self._first_span(task.unit)
        if found != planned:
            raise RunFailed(
                f"input shard {shard.name} (number {task.unit}) gave {found} samples, {planned} were planned. Run the same command again."
            )

    def _bury(self, task: _Running, error: Exception) -> None:
        """An actor died, by itself or by its deadlines: its input shard goes to a new one, carefully from the first span that did not arrive."""
        self.watch.died(self.numbers[task.actor], task.unit)
        if self.fleet.dismiss(task.actor):  # the machine is to blame, and no sample
            self.again.append((task.unit, task.next_span))
            return
        self.deaths[task.unit, task.next_span] += 1
        deaths = self.deaths[task.unit, task.next_span]
        if deaths == MAX_DEATHS:
            first = task.next_span * SPAN_SAMPLES
            raise RunFailed(
                f"input shard {self.shards[task.unit].name} (number {task.unit}) killed its worker {deaths} times, at samples "
                f"{first}..{first + SPAN_SAMPLES - 1} of it. It is not their decoding, which was done apart: see that the tokenizer can encode them, in "
                f"--sample-timeout for each image, and that memory suffices. What was committed is safe. ({error})"
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
