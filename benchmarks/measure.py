"""How things are measured and printed: interleaved runs, medians, one line for each ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REPEATS = 5


@dataclass(frozen=True)
class Target:
    """What a ratio should be: at least a bound or, for what should be small, at most one."""

    bound: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether the ratio is as it should be; a ratio that is not a number is a miss."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Line:
    """One result, printed as `ratio  title: ours against other  [target]`."""

    ratio: float
    title: str
    ours: str
    other: str
    target: Target | None = None

    def __str__(self) -> str:
        text = f"{self.ratio:8.3g}  {self.title}: {self.ours} against {self.other}"
        if self.target is None:
            return text
        return f"{text}  [target {self.target}: {'met' if self.target.met(self.ratio) else 'MISSED'}]"


def speed(title: str, ours: float, other: float, target: float | None = None) -> Line:
    """A ratio of speeds, above 1 when ours is faster; both in seconds."""
    return Line(other / ours, title, duration(ours), duration(other), None if target is None else Target(target))


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best.

    >>> duration(0.0123), duration(75e-6)
    ('12.3 ms', '75.0 us')
    """
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.1f} {unit}"
    return f"{seconds * 1e6:,.1f} us"


def timed(work: Callable[[], Any]) -> float:
    """Seconds that one run takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def again(work: Callable[[], Any]) -> float:
    """Seconds of the second of two runs in a row: what waited long has cold pages, and the peer before may still be at it."""
    work()
    return timed(work)


def medians(
    works: Mapping[str, Callable[[], Any]], repeats: int = REPEATS, clock: Callable[[Callable[[], Any]], float] = timed
) -> dict[str, float]:
    """The median seconds of each work, after one run of each to warm up.

    Runs are interleaved (A, B, A, B, ...), so that what else the machine does meets all of them.

    Args:
        works: what to run, by name.
        repeats: runs of each that count.
        clock: gives the seconds of one run.
    """
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work))
    return {name: statistics.median(values) for name, values in times.items()}


def best(works: Mapping[str, Callable[[], Any]], repeats: int = 25) -> dict[str, float]:
    """The least seconds of each work, runs interleaved: what a loaded machine disturbs least."""
    times = {name: [timed(work)] for name, work in works.items()}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(timed(work))
    return {name: min(values) for name, values in times.items()}


def compare(title: str, ours: Callable[[], Any], other: Callable[[], Any], target: float | None = None) -> Line:
    """Ours against one other, each the second of two runs."""
    found = medians({"ours": ours, "other": other}, clock=again)
    return speed(title, found["ours"], found["other"], target)
