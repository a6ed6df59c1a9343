"""From a video file to clips of squares: what `images.prepare` is for images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation

from pipelines.corpus.images import Preprocessing
from pipelines.corpus.problems import BadImage, Problem, Reason
from pipelines.corpus.square import Pixels, pad_square, resize_planes
from pipelines.corpus.timeline import ClipRule, clips, held
from pipelines.corpus.video import FRAME_BYTES, Findings, Video


@dataclass(frozen=True)
class Clip:
    """A clip, as a tokenizer takes it.

    Attributes:
        index: its place in the video.
        start_seconds: its first instant, on the file's own clock.
        times: when each of its frames began to be shown, seconds, likewise.
        padded: how many at its end repeat the one before.
        pixels: uint8 [T, channels, S, S].
    """

    index: int
    start_seconds: float
    times: tuple[float, ...]
    padded: int
    pixels: Pixels


class VideoClips:
    """The clips of one file, to be gone through once."""

    def __init__(
        self, source: Path | bytes, rule: ClipRule, preprocessing: Preprocessing, *, fast: bool = False
    ) -> None:
        """Opens nothing yet.

        Args:
            source: a path, or the file's bytes.
            rule: how it is cut.
            preprocessing: how frames become squares; rotation and pixel aspect are applied.
            fast: frames are made small by swscale (area averages) rather than by torch's antialiased bicubic.
        """
        self._video = Video(source, preprocessing.max_memory_bytes)
        self._rule, self._preprocessing, self._fast = rule, preprocessing, fast
        self._number = 0

    @property
    def findings(self) -> Findings:
        """What was found so far."""
        return self._video.findings

    def __iter__(self) -> Iterator[Clip]:
        """Gives each clip as soon as it is whole.

        Raises:
            BadImage: it is no video, or has not one clip.
        """
        for cut in clips(self._taken(), self._rule):
            self._number += 1
            yield Clip(cut.index, float(cut.start), tuple(map(float, cut.times)), cut.padded, np.stack(cut.frames))
        if not self._number:
            raise self._nothing()

    def warning(self) -> Problem | None:
        """What is missing of a video of which clips could be had; None when nothing is. Ask when they are all taken."""
        said = self.findings.warning()
        return Problem(Reason.PARTLY_DECODED, f"{said}; {self._number:,} clips are whole") if said else None

    def _taken(self) -> Iterator[tuple[Pixels, Fraction, Fraction, int]]:
        for shown in held(self._video.frames(), self._rule.rate):
            if shown.instants:  # the others are decoded, but not made small
                try:
                    square = self._square(shown.frame)
                except BadImage as error:
                    if not self._number:
                        raise
                    self.findings.problem = f"it cannot be read to its end: {error.detail}"
                    return
                for instant in shown.instants:
                    yield square, instant, shown.time, shown.run

    def _square(self, frame: VideoFrame) -> Pixels:
        wanted = self._preprocessing
        if frame.width * frame.height * FRAME_BYTES > wanted.max_memory_bytes:
            raise BadImage(Reason.TOO_MANY_PIXELS, f"a frame of {frame.width} x {frame.height} in the middle")
        return frame_square(frame, self.findings.pixel_aspect, self.findings.rotation, wanted, fast=self._fast)

    def _nothing(self) -> BadImage:
        """Why there is no clip."""
        found = self.findings
        if found.encrypted and not found.frames:
            return BadImage(Reason.ENCRYPTED, f"{found.packets:,} packets, none of which can be decoded without a key")
        said = found.warning()
        if not found.frames:
            return BadImage(Reason.NO_FRAMES, said or f"{found.declared:,} frames are declared, none is there")
        end = f"; {said}" if said else ""
        return BadImage(
            Reason.TOO_SHORT, f"{found.frames:,} frames, which are fewer than a clip of {self._rule.frames} needs{end}"
        )


def frame_square(
    frame: VideoFrame, pixel_aspect: Fraction, rotation: int, preprocessing: Preprocessing, *, fast: bool = False
) -> Pixels:
    """A frame as the square that is seen: uint8 [channels, S, S], upright, with square pixels.

    Args:
        frame: decoded.
        pixel_aspect: width of its pixels over their height.
        rotation: degrees counter-clockwise by which it is turned; rounded to quarters.
        preprocessing: size, channels, fit, background.
        fast: made small by swscale.
    """
    form = "rgb24" if preprocessing.channels == 3 else "gray"
    left, top, right, bottom, width, height = _geometry(frame.width, frame.height, pixel_aspect, preprocessing)
    if fast:
        across, down = Fraction(width, right - left), Fraction(height, bottom - top)
        whole = (max(width, round(frame.width * across)), max(height, round(frame.height * down)))
        decoded = frame.to_ndarray(width=whole[0], height=whole[1], format=form, interpolation=Interpolation.AREA)
        left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
        right, bottom = left + width, top + height
    else:
        decoded = frame.to_ndarray(format=form)
    pixels = cast("Pixels", decoded if decoded.ndim == 3 else decoded[:, :, None])
    planes = resize_planes(pixels[top:bottom, left:right], width, height)
    planes = np.rot90(planes, round(rotation / 90), axes=(1, 2))
    return pad_square(planes, preprocessing.size, preprocessing.background)


def _geometry(width: int, height: int, aspect: Fraction, preprocessing: Preprocessing) -> tuple[int, ...]:
    """The box that is seen, in stored pixels, and width and height that it is made into."""
    size, shown = preprocessing.size, width * aspect  # what the frame is wide when its pixels are square
    if preprocessing.fit == "pad":
        scale = size / max(shown, Fraction(height))
        return 0, 0, width, height, max(1, round(shown * scale)), max(1, round(height * scale))
    side = min(shown, Fraction(height))
    across, down = min(width, max(1, round(side / aspect))), min(height, max(1, round(side)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down, size, size
