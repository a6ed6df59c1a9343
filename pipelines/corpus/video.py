"""The one safe way from a video file to its frames: in the order they are shown, with their times, and what was wrong.

Only demuxers and protocols of our lists are used, so that a playlist opens nothing. One thread decodes; frames are not kept.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import av.logging
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.corpus.problems import BadImage, Reason
from pipelines.corpus.timeline import Stamps

CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "ogg", "flv", "asf")
FRAME_BYTES = (
    24  # of each pixel, while a frame is decoded and made small: the decoder's reference frames, RGB and a copy
)
MISSING_SECONDS = Fraction(1, 4)  # at the end, beyond which a video is cut: what headers say is rounded
DEFAULT_RATE = Fraction(25)  # where a file says nothing
av.logging.set_level(None)  # what is wrong with a file is told in rows, not on the terminal


@dataclass
class Findings:
    """What a file said of itself, and what decoding it showed.

    Attributes:
        container: the demuxer.
        codec: the decoder.
        width: of the first frame as stored, pixels.
        height: likewise.
        rotation: degrees counter-clockwise by which it is turned to be seen.
        pixel_aspect: width of a pixel over its height.
        rate: frames a second, as the file says.
        declared: frames, as the file says; 0 when it does not.
        packets: that held something.
        frames: that were decoded.
        broken: packets that could not be decoded, and frames that the decoder calls corrupt.
        mended: times that were missing or did not grow.
        encrypted: whether packets say so.
        problem: why it could not be read to its end; empty when it could.
    """

    container: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    rotation: int = 0
    pixel_aspect: Fraction = Fraction(1)
    rate: Fraction = DEFAULT_RATE
    declared: int = 0
    packets: int = 0
    frames: int = 0
    broken: int = 0
    mended: int = 0
    encrypted: bool = False
    problem: str = ""

    def warning(self) -> str:
        """In one line what is missing of the video; empty when nothing is."""
        said = [self.problem] if self.problem else []
        if self.broken:
            said.append(f"{self.broken:,} of {self.packets:,} packets are broken")
        elif self.declared > self.packets:
            said.append(f"{self.packets:,} of {self.declared:,} frames are there")
        return "; ".join(said)


@dataclass
class Video:
    """A file whose frames can be gone through once.

    Attributes:
        source: a path, or the file's bytes.
        max_memory_bytes: what a frame may take; see FRAME_BYTES.
        findings: filled while the frames are read.
    """

    source: Path | bytes
    max_memory_bytes: int
    findings: Findings = field(default_factory=Findings)

    def frames(self) -> Iterator[tuple[VideoFrame, Fraction, Fraction]]:
        """Each frame, when it is shown and for how long, in seconds; as far as the file can be decoded.

        Raises:
            BadImage: it is no video, or of a kind that is not read; not a single frame is needed to find this out.
        """
        with closing(_open(self.source)) as container:
            stream = _stream(container)
            self._describe(container, stream)
            yield from self._decoded(container, stream)

    def _describe(self, container: Any, stream: VideoStream) -> None:
        context, found = stream.codec_context, self.findings
        most = self.max_memory_bytes // FRAME_BYTES
        if context.width * context.height > most:
            raise BadImage(
                Reason.TOO_MANY_PIXELS,
                f"{context.width} x {context.height} a frame; at most {most:,} pixels fit the memory allowed",
            )
        context.thread_count = 1
        # Of frames that are larger than the header says; decoders round sizes up.
        context.options = {"max_pixels": str(most * 5 // 4 + 65_536)}
        found.container, found.codec, found.declared = container.format.name, context.name, stream.frames
        found.rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE

    def _decoded(self, container: Any, stream: VideoStream) -> Iterator[tuple[VideoFrame, Fraction, Fraction]]:
        found = self.findings
        base = stream.time_base or 1 / found.rate
        stamps = Stamps(int(1 / (found.rate * base)), has_pts=found.container != "avi")
        begin = end = Fraction(0)
        for frame in self._frames(container, stream):
            found.broken += frame.is_corrupt
            if not found.frames:
                found.width, found.height, found.rotation = frame.width, frame.height, round(frame.rotation)
                found.pixel_aspect = _pixel_aspect(stream)
            found.frames += 1
            time, length = stamps(frame.pts, frame.dts, frame.duration)
            begin = time * base if found.frames == 1 else begin
            end, found.mended = (time + length) * base, stamps.mended
            yield frame, time * base, length * base
        missing = _claimed_seconds(container, stream) - (end - begin)
        if found.frames and not found.problem and missing > max(MISSING_SECONDS, 2 / found.rate):
            found.problem = f"it ends after {float(end - begin):.1f} s, {float(missing):.1f} s before it should"

    def _frames(self, container: Any, stream: VideoStream) -> Iterator[VideoFrame]:
        """Whatever the decoder gives; broken packets are counted."""
        packets, found = container.demux(stream), self.findings
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                found.problem = f"it cannot be read to its end: {_words(error)}"
                packet = None
            if packet is not None and packet.size:
                found.packets += 1
                found.encrypted |= packet.has_sidedata("encryption_info")
            try:  # a packet of no size, and none, take what the decoder has left
                yield from packet.decode() if packet is not None else stream.decode(None)
            except av.error.EOFError:
                return  # nothing was left
            except av.error.FFmpegError:
                found.broken += 1
            if packet is None:
                return


def _open(source: Path | bytes) -> Any:
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    name = f"file:{source.absolute()}" if isinstance(source, Path) else io.BytesIO(source)
    try:
        return av.open(name, options=allowed, metadata_errors="replace")
    except FileNotFoundError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise BadImage(*_refusal(source, error)) from None


def _refusal(source: Path | bytes, error: Exception) -> tuple[Reason, str]:
    """Why a file cannot be opened, told from its first bytes."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(16)
    else:
        head = source[:16]
    if not head:
        return Reason.EMPTY, "0 bytes"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide"):
        return Reason.TRUNCATED, "an MP4 or QuickTime file whose index (moov) is missing or broken"
    if head.startswith((b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"0&\xb2u")):
        return Reason.DECODE_ERROR, f"begins as a video, but cannot be opened: {_words(error)}"
    return Reason.NOT_A_VIDEO, "the bytes are those of no video format that is read"


def _stream(container: Any) -> VideoStream:
    """The stream to be decoded: no attached picture; what is marked as default before others, then the largest, then the first.

    Raises:
        BadImage: there is none.
    """
    found = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not found:
        others = Counter(stream.type for stream in container.streams)
        said = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items())) or "none"
        raise BadImage(Reason.NO_VIDEO, f"no video among its streams ({said})")
    known = [stream for stream in found if stream.codec_context is not None]
    if not known:
        raise BadImage(Reason.UNSUPPORTED_FORMAT, "no decoder for its video stream")

    def rank(stream: VideoStream) -> tuple[bool, int, int]:
        return bool(stream.disposition & Disposition.default), stream.width * stream.height, -stream.index

    return max(known, key=rank)


def _claimed_seconds(container: Any, stream: VideoStream) -> Fraction:
    """How long the video is as the file says; 0 when it does not, as MPEG streams do not. The file's own length counts where it has no sound."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    return (
        Fraction(container.duration, av.time_base)
        if container.duration and len(container.streams) == 1
        else Fraction(0)
    )


def _pixel_aspect(stream: VideoStream) -> Fraction:
    """Width of a pixel over its height; 1 where a file says nothing, or nonsense."""
    said = stream.sample_aspect_ratio
    return Fraction(said) if said and Fraction(1, 20) <= said <= 20 else Fraction(1)


def _words(error: Exception) -> str:
    """What FFmpeg says, without its number and the file's place."""
    return str(getattr(error, "strerror", None) or error).partition(": '")[0]
