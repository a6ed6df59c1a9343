"""What a training run tells: metrics as lines of JSON, the same as TensorBoard events when asked for, and notes for people."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmill.errors import UsageError
from vqmill.files import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE = "metrics.jsonl"
NOTES_FILE = "notes.txt"  # a line each; whoever started the run shows them as they come


class TrainingLog:
    """Rank 0's pen; on other ranks it writes nothing.

    Args:
        folder: for `metrics.jsonl` and `notes.txt`.
        rank: whose log it is.
        batch_size: samples of a step, for the speed.
        tensorboard: a folder for event files, or None.
    """

    def __init__(self, folder: Path, rank: int, batch_size: int, tensorboard: Path | None = None) -> None:
        self._folder, self._writes, self._batch_size = folder, rank == 0, batch_size
        self._tensorboard = tensorboard if rank == 0 else None
        self._events: SummaryWriter | None = None
        self._clock, self._clock_step = time.monotonic(), 0

    def begin(self, step: int) -> None:
        """Goes on behind a step: what was logged of later ones is dropped, because they will be done again."""
        self._clock_step = step
        if self._writes:
            _forget_after(self._folder / METRICS_FILE, step)
        if self._tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            first = not self._tensorboard.exists()
            self._events = SummaryWriter(str(self._tensorboard), purge_step=step + 1)
            metrics = self._folder / METRICS_FILE
            if first and metrics.exists():  # of a run that was begun without TensorBoard
                for line in metrics.read_text().splitlines():
                    self._add_points(json.loads(line))

    def record(self, values: Mapping[str, Any]) -> None:
        """Writes a line: `step`, and anything else that JSON takes. Numbers become points in TensorBoard."""
        if not self._writes:
            return
        with (self._folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(values) + "\n")
        self._add_points(values)

    def _add_points(self, values: Mapping[str, Any]) -> None:
        if self._events:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, values["step"])

    def training(self, values: Mapping[str, Any]) -> None:
        """Writes the line of a training step, with `samples_per_second` since the one before."""
        now, step = time.monotonic(), values["step"]
        speed = (step - self._clock_step) * self._batch_size / max(now - self._clock, 1e-9)
        self.record({**values, "samples_per_second": speed})
        self._clock, self._clock_step = now, step

    def note(self, text: str) -> None:
        """Tells people something, in one line."""
        if self._writes:
            with (self._folder / NOTES_FILE).open("a") as file:
                file.write(text + "\n")

    def flush(self) -> None:
        """Makes the events safe: a resume point is to come, and what lies before it will not be written again."""
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Ends the event file."""
        if self._events:
            self._events.close()


def require_tensorboard() -> None:
    """Refuses a run whose events could not be written.

    Raises:
        UsageError: the package `tensorboard` is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard: the package `tensorboard`, which writes event files, is not installed. "
            "Run: pip install 'vqmill[tensorboard]', or leave the flag out: metrics.jsonl has the same numbers."
        )


def newest_record(path: Path, name: str, tail_bytes: int | None = None) -> dict[str, Any] | None:
    """The last whole line of a metrics file that has a value of this name: `learning_rate` of steps, `validation/loss` of evaluations.

    Args:
        path: the file; None comes of one that is not there.
        name: of the value.
        tail_bytes: so many at its end are read; all of them when None.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(0 if tail_bytes is None else max(0, path.stat().st_size - tail_bytes))
        lines = file.read().split(b"\n")
    # The first piece may begin, and the last may end, in the middle of a line.
    found = [record for line in lines[:-1] if line.startswith(b"{") and name in (record := json.loads(line))]
    return found[-1] if found else None


def _forget_after(path: Path, step: int) -> None:
    """Drops the log lines of steps that will be done again."""
    if path.exists():
        whole = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
        lines = [line for line in whole.splitlines() if json.loads(line)["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in lines).encode())
