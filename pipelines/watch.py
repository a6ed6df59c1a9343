"""What people see of a job under way, and what is noted of each worker and each input shard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.assembly import SpanFacts
from pipelines.corpus.plan import InputShard
from pipelines.shard_log import Note
from vqmill.commits import Counts

SILENT_SECONDS = 30.0  # after which a worker that gives nothing is mentioned


@dataclass
class Worker:
    """One encoder actor, or the row of those that took each other's place.

    Attributes:
        samples: that came back from it.
        seconds: that it spent on them; what is left of the job's time it waited.
        deaths: how often it had to be replaced.
        input_shard: what it is at; None when idle.
        heard: when it last gave something, on the monotonic clock.
    """

    samples: int = 0
    seconds: float = 0.0
    deaths: int = 0
    input_shard: int | None = None
    heard: float = field(default_factory=time.monotonic)

    def facts(self) -> dict[str, Any]:
        """What is kept of it when the job has ended."""
        return {"samples": self.samples, "seconds": round(self.seconds, 3), "deaths": self.deaths}


@dataclass
class ShardStatistics:
    """What one input shard gave in this run.

    Attributes:
        input_shard: its place in the corpus.
        name: see `InputShard`.
        bytes: of it, whole.
        first_span: where this run began with it; what lies before was committed by an earlier run.
        encoded: samples.
        quarantined: samples.
        reasons: of these, by reason.
        rows: code rows.
        seconds: that workers spent on it.
        worker: the number of the one that ended it.
        deaths: of workers that were at it.
    """

    input_shard: int
    name: str
    bytes: int
    first_span: int
    encoded: int = 0
    quarantined: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    rows: int = 0
    seconds: float = 0.0
    worker: int = 0
    deaths: int = 0


class Watch:
    """Is told by the driver what its workers do.

    Attributes:
        workers: those that have started, by number.
        starting: how many have not.
    """

    def __init__(
        self,
        shards: Sequence[InputShard],
        counts: Counts,
        total: int,
        retried: Callable[[int], int],
        show: Callable[[int, int, str], None],
        note: Note,
    ) -> None:
        """Begins.

        Args:
            shards: the plan's.
            counts: samples that were committed before.
            total: samples of the plan.
            retried: of so many samples, those that were counted as quarantined before and have been tried again; see `StoreSpec.retried`.
            show: called with (samples done, samples in all, a few words).
            note: called with the statistics of each input shard that is done.
        """
        self.workers: list[Worker] = []
        self.starting = 0
        self._shards, self._before, self._total = shards, counts, total
        self._retried, self._show, self._note = retried, show, note
        self._new, self._reasons = Counts(), Counter[str]()
        self._open: dict[int, ShardStatistics] = {}

    def hired(self, workers: int) -> None:
        """So many workers are there."""
        self.workers += [Worker() for _ in range(workers - len(self.workers))]

    def began(self, worker: int, unit: int, span: int) -> None:
        """A worker was given an input shard, from a span on."""
        shard, at = self._shards[unit], self.workers[worker]
        at.input_shard, at.heard = unit, time.monotonic()
        self._open.setdefault(unit, ShardStatistics(unit, shard.name, shard.num_bytes, span))

    def arrived(self, worker: int, unit: int, facts: SpanFacts) -> None:
        """A span came back."""
        at, shard = self.workers[worker], self._open[unit]
        at.samples += facts.counts.seen
        at.seconds += facts.seconds
        at.heard = time.monotonic()
        shard.encoded += facts.counts.encoded
        shard.quarantined += facts.counts.quarantined
        shard.reasons.update(facts.reasons)
        shard.rows += facts.rows
        shard.seconds += facts.seconds
        self._new += facts.counts
        self._reasons.update(facts.reasons)
        self.show()

    def ended(self, worker: int, unit: int) -> None:
        """An input shard is done."""
        self.workers[worker].input_shard = None
        shard = self._open.pop(unit)
        shard.worker, shard.seconds = worker, round(shard.seconds, 3)
        self._note(vars(shard))  # asdict cannot copy a Counter

    def left(self, worker: int) -> None:
        """A worker gave an input shard back that is not done."""
        self.workers[worker].input_shard = None

    def held_back(self, worker: int) -> None:
        """A worker waits until what it gave is taken: its silence says nothing of it."""
        self.workers[worker].heard = time.monotonic()

    def died(self, worker: int, unit: int) -> None:
        """A worker died at an input shard, and is replaced."""
        self.workers[worker].deaths += 1
        self.workers[worker].input_shard = None
        self._open[unit].deaths += 1

    def show(self) -> None:
        """Moves the display."""
        counts = self._before + self._new
        self._show(counts.seen, self._total, "; ".join(filter(None, (self._set_aside(counts), self._health()))))

    def _set_aside(self, counts: Counts) -> str:
        quarantined = counts.quarantined - self._retried(counts.seen)
        if not quarantined:
            return ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._reasons.most_common())
        before = "" if not self._before.quarantined or not reasons else "by this run: "
        return f"{quarantined:,} quarantined" + (f" ({before}{reasons})" if reasons else "")

    def _health(self) -> str:
        """Workers in the words of a line; those that are well take none of it but their number."""
        if not self.workers and not self.starting:
            return ""
        busy = [worker for worker in self.workers if worker.input_shard is not None]
        words = [f"{len(busy)} of {len(self.workers)} workers busy"]
        if self.starting:
            words.append(f"{self.starting} not started yet")
        if deaths := sum(worker.deaths for worker in self.workers):
            words.append(f"{deaths} replaced")
        now = time.monotonic()
        for number, worker in enumerate(self.workers):
            if worker.input_shard is not None and now - worker.heard > SILENT_SECONDS:
                words.append(
                    f"worker {number} gave nothing for {now - worker.heard:.0f} s ({self._shards[worker.input_shard].name})"
                )
        return ", ".join(words)
