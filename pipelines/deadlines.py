"""Ends this process when a step of it takes too long."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

SOON = 0.001  # seconds: 0 would switch the timer off


class Deadlines:
    """Steps under way, in any number of threads, each with the time it may take.

    The kernel's timer ends the process (by SIGALRM), so a step is ended wherever it is, and though it never gives the interpreter back, as
    decoders do that hang. There is one such timer in a process: use one object, in a process whose end harms nobody.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._due: dict[object, float] = {}

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """The process does not live longer than this unless the block is left."""
        step = object()
        with self._lock:
            self._due[step] = time.monotonic() + seconds
            self._set_timer()
        try:
            yield
        finally:
            with self._lock:
                del self._due[step]
                self._set_timer()

    def _set_timer(self) -> None:
        left = max(SOON, min(self._due.values()) - time.monotonic()) if self._due else 0
        signal.setitimer(signal.ITIMER_REAL, left)
