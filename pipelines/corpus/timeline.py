"""When frames are shown, and which of them a clip takes. Pure: times are exact fractions of a second, frames are anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Literal, TypeVar

from vqmill.errors import CodesError

Frame = TypeVar("Frame")
Kept = TypeVar("Kept")
Tail = Literal["drop", "pad"]

MAX_HOLD_SECONDS = 10  # a frame that would be shown for longer ends a run: its timestamps have jumped,
MAX_LENGTH_SECONDS = 600  # unless it says itself that it is shown for so long, as slides do
MAX_RATE = 1000
MAX_FRAMES = 4096  # of a clip


class Stamps:
    """Gives each decoded frame its time, in ticks, though some files misreport them.

    Frames come in the order in which they are shown. Their presentation time is believed as long as it goes wrong no more often than the
    decoding time, as FFmpeg does it (guess_correct_pts in libavcodec/decode.c). What still does not grow is put one frame's length behind the
    frame before.
    """

    def __init__(self, length: int, *, has_pts: bool = True) -> None:
        """Begins a file.

        Args:
            length: of a frame that does not say its own, ticks.
            has_pts: whether the container has presentation times; AVI has not, and what is then guessed for B-frames is out of order.
        """
        self._length = max(1, length)
        self._last: int | None = None
        self._next = 0
        self._last_pts = self._last_dts = -(1 << 63)
        self._bad_pts, self._bad_dts = int(not has_pts), 0
        self.mended = 0

    def __call__(self, pts: int | None, dts: int | None, length: int | None) -> tuple[int, int]:
        """A frame's time and length, ticks; times grow from frame to frame.

        Args:
            pts: presentation time; None when it is not known.
            dts: decoding time of the packet that gave the frame; None when it is not known.
            length: how long it is shown; None or 0 when it is not known.
        """
        if dts is not None:
            self._bad_dts += dts <= self._last_dts
            self._last_dts = dts
        if pts is not None:
            self._bad_pts += pts <= self._last_pts
            self._last_pts = pts
        time = pts if pts is not None and (self._bad_pts <= self._bad_dts or dts is None) else dts
        if time is None or (self._last is not None and time <= self._last):
            self.mended += 1
            time = self._next
        length = length if length and length > 0 else self._length
        self._last, self._next = time, time + length
        return time, length


@dataclass(frozen=True)
class Shown(Generic[Frame]):
    """A frame, when it begins to be shown, and how often a clip takes it.

    Attributes:
        frame: anything.
        time: when it begins, seconds.
        instants: at which it is taken, seconds; none when it is skipped.
        run: counts the stretches without a jump of the timestamps; clips stay within one.
    """

    frame: Frame
    time: Fraction
    instants: tuple[Fraction, ...]
    run: int


def held(frames: Iterable[tuple[Frame, Fraction, Fraction]], rate: Fraction | None) -> Iterator[Shown[Frame]]:
    """At each instant the frame that is shown then; instants lie 1 / rate apart, the first one at the first frame.

    So frame rates that vary are right, a frame of a slow video is taken several times, and one of a fast video perhaps never. The last frame is
    shown for its own length.

    Args:
        frames: (frame, time, length) in seconds; times grow.
        rate: instants a second; None for every frame once.
    """
    before: tuple[Frame, Fraction, Fraction] | None = None
    origin, index, run = Fraction(0), 0, 0
    for found in frames:
        if before is None:
            origin = found[1]
        else:
            jumped = found[1] - before[1] > max(MAX_HOLD_SECONDS, min(before[2], MAX_LENGTH_SECONDS))
            end = before[1] + min(before[2], MAX_LENGTH_SECONDS) if jumped else found[1]
            instants = _instants(origin, index, rate, before[1], end)
            yield Shown(before[0], before[1], instants, run)
            index += len(instants)
            if jumped:
                origin, index, run = found[1], 0, run + 1
        before = found
    if before is not None:
        end = before[1] + min(before[2], Fraction(MAX_HOLD_SECONDS))
        yield Shown(before[0], before[1], _instants(origin, index, rate, before[1], end), run)


def _instants(
    origin: Fraction, index: int, rate: Fraction | None, begin: Fraction, end: Fraction
) -> tuple[Fraction, ...]:
    """Those before `end`, of the ones from `index` on."""
    if rate is None:
        return (begin,)
    stop = -((origin - end) * rate // 1)  # the first one at `end` or behind
    return tuple(origin + number / rate for number in range(index, stop))


@dataclass(frozen=True)
class ClipRule:
    """How a video is cut into clips.

    Attributes:
        frames: of a clip, T.
        rate: frames a second that are taken; None for all frames of the file.
        stride: frames from the beginning of a clip to that of the next; None for `frames`: no overlap, no gap.
        tail: what becomes of frames behind the last whole clip: `drop`, or `pad`: one more clip, whose last frame is repeated.
    """

    frames: int = 16
    rate: Fraction | None = None
    stride: int | None = None
    tail: Tail = "drop"

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MAX_FRAMES:
            raise CodesError(f"clips: frames must be from 1 to {MAX_FRAMES:,}, not {self.frames}.")
        if self.rate is not None and not 0 < self.rate <= MAX_RATE:
            raise CodesError(f"clips: rate must be above 0 and at most {MAX_RATE} frames a second, not {self.rate}.")
        if self.stride is not None and self.stride < 1:
            raise CodesError(f"clips: stride must be at least 1 frame, not {self.stride}.")
        if self.tail not in ("drop", "pad"):
            raise CodesError(f"clips: tail must be 'drop' or 'pad', not {self.tail!r}.")

    @property
    def step(self) -> int:
        """Frames from the beginning of a clip to that of the next."""
        return self.stride or self.frames


@dataclass(frozen=True)
class Cut(Generic[Kept]):
    """A clip.

    Attributes:
        index: its place in the video.
        start: its first instant, seconds.
        frames: T of them.
        times: when each of them began to be shown, seconds.
        padded: how many at the end repeat the one before.
    """

    index: int
    start: Fraction
    frames: tuple[Kept, ...]
    times: tuple[Fraction, ...]
    padded: int = 0


def clips(frames: Iterable[tuple[Kept, Fraction, Fraction, int]], rule: ClipRule) -> Iterator[Cut[Kept]]:
    """Cuts frames that were taken into clips; at most max(T, stride) of them are held at a time.

    Args:
        frames: (frame, the instant, when it began to be shown, run) for each instant.
        rule: how.
    """
    waiting: list[tuple[Kept, Fraction, Fraction]] = []
    index, fresh, skip, current = 0, 0, 0, 0

    def cut(padded: int = 0) -> Cut[Kept]:
        taken = waiting[: rule.frames]
        taken += [taken[-1]] * padded
        return Cut(index, taken[0][1], tuple(part[0] for part in taken), tuple(part[2] for part in taken), padded)

    def missing() -> int:
        """How many frames a clip of the rest lacks; 0 when there is nothing new in it."""
        return rule.frames - len(waiting) if rule.tail == "pad" and fresh else 0

    for frame, instant, time, run in frames:
        if run != current:
            if lacking := missing():
                yield cut(lacking)
                index += 1
            waiting, fresh, skip, current = [], 0, 0, run
        if skip:
            skip -= 1
            continue
        waiting.append((frame, instant, time))
        fresh += 1
        if len(waiting) == rule.frames:
            yield cut()
            index += 1
            skip = max(0, rule.step - rule.frames)
            waiting, fresh = waiting[rule.step :], 0
    if lacking := missing():
        yield cut(lacking)
