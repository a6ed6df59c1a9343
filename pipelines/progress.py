"""One progress display for every job: a bar on a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.interrupts import check

LOG_EVERY_SECONDS = 30.0


class Meter:
    """Shows how far a job is. Call it with what is done and what is to be done."""

    def __init__(self, title: str, unit: str, console: Console, bar: Progress | None) -> None:
        self._title, self._unit, self._console, self._bar = title, unit, console, bar
        self._task = bar.add_task(title, total=None, note="", rate="") if bar else None
        self._start = self._logged = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Moves the display.

        Args:
            done: how much is done, counting what an earlier run did.
            total: of how much; None when it is not known.
            note: a few words more, such as the loss.
        """
        check()
        if self._first is None:  # what comes before, such as Ray's start, is no part of the rate
            self._first, self._start = done, time.monotonic()
            if self._bar is not None and self._task is not None:
                self._bar.reset(self._task, completed=done, total=total)
        now = time.monotonic()
        rate = (done - self._first) / (now - self._start) if now > self._start else 0.0
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note, rate=f"{rate:,.1f}/s" if rate else "")
            return
        if now - self._logged < LOG_EVERY_SECONDS:
            return
        self._logged = now
        left = f", {(total - done) / rate:,.0f} s left" if total and rate > 0 else ""
        of = f" of {total:,} ({done / total:.0%})" if total else ""
        self._console.print(
            f"{self._title}: {done:,}{of} {self._unit}, {rate:,.1f}/s{left}{'; ' + note if note else ''}",
            highlight=False,
            soft_wrap=True,
        )

    def say(self, text: str) -> None:
        """Prints a line above the display, after the title."""
        self._console.print(f"{self._title}: {text}", highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def meter(title: str, unit: str) -> Iterator[Meter]:
    """A display for one job, on standard error; gone when the job ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(title, unit, console, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield Meter(title, unit, console, bar)
