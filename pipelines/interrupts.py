"""Ctrl-C that is not lost, and Ctrl-C that waits for the work in hand."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

_stopped = False


def stop(number: int, frame: FrameType | None) -> None:
    """The command line's handler of Ctrl-C and SIGTERM: interrupts what runs, and remembers it, see `check`.

    Raises:
        KeyboardInterrupt: always.
    """
    global _stopped
    _stopped = True
    raise KeyboardInterrupt


def check() -> None:
    """Interrupts again what was interrupted where Python cannot pass it on: in a destructor, or in a callback of a fork.

    Raises:
        KeyboardInterrupt: `stop` was called before, and this is the main thread.
    """
    if _stopped and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


class PatientInterrupt:
    """Puts Ctrl-C off until the block looks for it or ends; the second one comes through at once.

    Only in the main thread, where signals arrive, and where Ctrl-C has its usual meaning; otherwise it changes nothing.

    Args:
        wanted: False changes nothing either.

    Attributes:
        asked: Ctrl-C has been pressed; leave the block when what is in hand is whole: KeyboardInterrupt is raised there.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self.asked = False
        self._holds = wanted

    def __enter__(self) -> PatientInterrupt:
        main = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGINT)
        self._holds &= main and self._before in (signal.default_int_handler, stop)
        if self._holds:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, self._before)
        if self.asked and error is None:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(
            2, b"\nstopping after this step, with a resume point; press Ctrl-C again to stop at once\n"
        )  # safe in a handler
