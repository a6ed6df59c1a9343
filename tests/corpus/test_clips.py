"""From video files to clips: pixels, times, orientation; what cannot be read is told apart."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image

from pipelines.corpus.clips import Clip, VideoClips, frame_square
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.problems import BadImage, Reason
from pipelines.corpus.timeline import ClipRule
from pipelines.corpus.video import FRAME_BYTES

SMALL = Preprocessing(size=32)
EACH = ClipRule(4)  # every frame


def film(
    count: int = 12, size: tuple[int, int] = (64, 48), *, codec: str = "libx264rgb", kind: str = "matroska", form: str = "rgb24", rate: int = 10,
    times: list[int] | None = None, rotation: int = 0, aspect: Fraction | None = None, audio: bool = False, options: dict[str, str] | None = None,
) -> bytes:  # fmt: skip
    """A video whose frame i is of brightness 20 (i mod 12), but for a red band above and a blue one on the left.

    Args:
        times: of the frames, in milliseconds.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(
            codec, rate=rate, options=options or ({"crf": "0"} if "264" in codec else {})
        )
        stream.width, stream.height = size
        stream.pix_fmt = form
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=8000) if audio else None
        for index in range(count):
            frame = VideoFrame.from_ndarray(picture(index, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            container.mux(sound.encode())
    return file.getvalue()


def picture(index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    width, height = size
    pixels = np.full((height, width, 3), 20 * (index % 12), np.uint8)
    pixels[: height // 4] = (255, 0, 0)
    pixels[:, : width // 4] = (0, 0, 255)
    return pixels


def of(data: bytes | Path, rule: ClipRule = EACH, preprocessing: Preprocessing = SMALL, **options: Any) -> list[Clip]:
    return list(VideoClips(data, rule, preprocessing, **options))


def brightness(clip: Clip) -> list[int]:
    return [round(float(frame[:, -2, -2].mean()) / 20) for frame in clip.pixels]


def problem(data: bytes | Path, rule: ClipRule = EACH, preprocessing: Preprocessing = SMALL) -> tuple[Reason, str]:
    with pytest.raises(BadImage) as caught:
        of(data, rule, preprocessing)
    return caught.value.reason, caught.value.detail


def test_a_video_is_cut_into_clips() -> None:
    found = of(film(11))
    assert [(clip.index, clip.start_seconds, clip.padded, clip.pixels.shape) for clip in found] == [
        (0, 0.0, 0, (4, 3, 32, 32)),
        (1, 0.4, 0, (4, 3, 32, 32)),
    ]
    assert [brightness(clip) for clip in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found[1].times == (0.4, 0.5, 0.6, 0.7)
    assert found[0].pixels.dtype == np.uint8
    assert found[0].pixels.flags.c_contiguous
    padded = of(film(11), ClipRule(4, tail="pad"))[-1]
    assert (brightness(padded), padded.padded) == ([8, 9, 10, 10], 1)
    slow = of(film(12), ClipRule(3, Fraction(5), stride=1))
    assert [brightness(clip) for clip in slow] == [[0, 2, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10]]


def test_frame_times_that_vary_are_held() -> None:
    found = of(film(4, times=[0, 100, 800, 900]), ClipRule(5, Fraction(10), tail="pad"))
    assert [brightness(clip) for clip in found] == [[0, 1, 1, 1, 1], [1, 1, 1, 2, 3]]
    assert found[1].times == (0.1, 0.1, 0.1, 0.8, 0.9)


@pytest.mark.parametrize(
    ("codec", "kind", "form"),
    [
        ("libx264", "mp4", "yuv420p"),
        ("libx265", "mp4", "yuv420p10le"),
        ("vp8", "webm", "yuv420p"),
        ("libvpx-vp9", "webm", "yuv420p"),
        ("mpeg4", "avi", "yuv420p"),
        ("mpeg2video", "mpegts", "yuv420p"),
        ("ffv1", "matroska", "yuv444p16le"),
        ("mjpeg", "mov", "yuvj420p"),
        ("flv", "flv", "yuv420p"),
    ],
)  # fmt: skip
def test_containers_and_codecs(codec: str, kind: str, form: str, tmp_path: Path) -> None:
    data = film(9, codec=codec, kind=kind, form=form, rate=25, options={"preset": "ultrafast"} if "26" in codec else {})
    found = of(data)
    assert [brightness(clip) for clip in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (tmp_path / "film ü.bin").write_bytes(data)
    for clip, again in zip(found, of(tmp_path / "film ü.bin"), strict=True):
        assert np.array_equal(clip.pixels, again.pixels)
        assert clip.times == again.times
    assert [round(clip.times[1] - clip.times[0], 2) for clip in found] == [0.04, 0.04]


def reference(frame: Image.Image, aspect: Fraction, turns: int, size: int, *, pad: bool) -> NDArray[np.uint8]:
    """The slow way: Pillow, square pixels first, then upright, then the square."""
    image = frame.resize((max(1, round(frame.width * aspect)), frame.height), Image.Resampling.BICUBIC)
    image = image.rotate(90 * turns, expand=True)
    if pad:
        scale = size / max(image.size)
        small = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
        )
        image = Image.new("RGB", (size, size), (255, 255, 255))
        image.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    else:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(4, 3), Fraction(1, 2)], ids=str)
def test_frames_are_turned_and_their_pixels_are_square(fit: Any, turns: int, aspect: Fraction) -> None:
    pixels = picture(6, (120, 80))
    frame = VideoFrame.from_ndarray(pixels, format="rgb24")
    found = frame_square(frame, aspect, 90 * turns, Preprocessing(size=32, fit=fit))
    wanted = reference(Image.fromarray(pixels), aspect, turns, 32, pad=fit == "pad")
    assert found.shape == (3, 32, 32)
    assert np.abs(found.astype(int) - wanted).mean() < 4
    quick = frame_square(frame, aspect, 90 * turns, Preprocessing(size=32, fit=fit), fast=True)
    assert np.abs(quick.astype(int) - wanted).mean() < 6


def test_a_files_own_rotation_and_pixel_aspect_are_applied() -> None:
    # Turned by a quarter, what was the left edge lies below.
    [clip] = of(film(4, kind="mp4", codec="libx264", form="yuv444p", rotation=90))
    assert clip.pixels[1, 2, 30, 16] > 200
    assert clip.pixels[1, 2, 1, 16] < 60
    video = VideoClips(film(4, aspect=Fraction(2)), EACH, Preprocessing(size=32, fit="pad"))
    [wide] = list(video)
    assert (video.findings.pixel_aspect, video.findings.width, video.findings.rotation) == (2, 64, 0)
    assert (wide.pixels[0, :, 0] == 255).all(), "64 x 48 pixels of 2 : 1 are a picture of 128 x 48"
    assert (wide.pixels[0, :, 16] != 255).any()


def test_grey_frames() -> None:
    [clip] = of(film(4), preprocessing=Preprocessing(size=16, channels=1))
    assert clip.pixels.shape == (4, 1, 16, 16)
    assert abs(int(clip.pixels[3, 0, -1, -1]) - 60) < 4


def test_frames_that_are_not_taken_are_not_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        VideoClips, "_square", lambda self, frame: made.append(frame.pts) or np.zeros((3, 8, 8), np.uint8)
    )
    assert len(of(film(12), ClipRule(2, Fraction(5, 2)))) == 1
    assert len(made) == 3


def test_a_cut_file_keeps_its_whole_clips_and_says_so() -> None:
    data = film(40, codec="libx264", form="yuv420p", kind="matroska", options={"g": "5", "crf": "0"})
    for share in (0.3, 0.5, 0.9):
        video = VideoClips(data[: int(len(data) * share)], EACH, SMALL)
        kept = list(video)
        assert video.warning(), share
        assert 0 < len(kept) < 10
        assert [brightness(clip)[0] for clip in kept] == [4 * index % 12 for index in range(len(kept))]
    whole = VideoClips(data, EACH, SMALL)
    assert len(list(whole)) == 10
    assert whole.warning() is None


def test_an_mp4_whose_frames_are_missing_warns(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(40):
            container.mux(stream.encode(VideoFrame.from_ndarray(picture(index, (64, 48)), format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.8)])
    video = VideoClips(path, EACH, SMALL)
    kept = list(video)
    found = video.warning()
    assert found is not None
    assert found.reason is Reason.PARTLY_DECODED
    assert f"{len(kept)} clips are whole" in found.detail
    assert 0 < len(kept) < 10


def test_broken_packets_are_counted_and_the_rest_is_used() -> None:
    data = bytearray(film(40, codec="png", kind="mov", options={}))
    places = [place for place in range(len(data)) if data[place : place + 4] == b"\x89PNG"]
    assert len(places) == 40
    for number in (3, 17):
        data[places[number] : places[number] + 64] = bytes(64)
    video = VideoClips(bytes(data), EACH, SMALL)
    assert len(list(video)) == 9
    assert video.findings.broken == 2
    assert "2 of 40 packets are broken; 9 clips are whole" in str(video.warning())


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", Reason.EMPTY, "0 bytes"),
        (b"<html>not found</html>", Reason.NOT_A_VIDEO, "no video format"),
        (b"\0\0\0\x18ftypmp42" + bytes(40), Reason.TRUNCATED, "moov"),
        (b"\x1aE\xdf\xa3" + bytes(40), Reason.DECODE_ERROR, "cannot be opened"),
        (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", Reason.NOT_A_VIDEO, "no video format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", Reason.NOT_A_VIDEO, "no video format"),
    ],
    ids=["empty", "text", "no index", "EBML", "playlist", "concat"],
)
def test_files_that_are_no_videos(data: bytes, reason: Reason, detail: str, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(data)
    for source in (data, tmp_path / "film.mp4"):
        found = problem(source)
        assert found[0] is reason
        assert detail in found[1]


def test_a_playlist_opens_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.ts").write_bytes(film(12, codec="mpeg2video", kind="mpegts", form="yuv420p", rate=25, options={}))
    lists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{tmp_path}/film.ts\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile {tmp_path}/film.ts\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        assert problem(tmp_path / name)[0] is Reason.NOT_A_VIDEO
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "concat:film.ts|film.ts"
    odd.write_bytes((tmp_path / "film.ts").read_bytes())
    assert len(of(odd)) == len(of(tmp_path / "film.ts")), "a name is a path, whatever it looks like"


def test_no_video_stream_no_frames_and_too_few() -> None:
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert problem(sound.getvalue()) == (Reason.NO_VIDEO, "no video among its streams (1 audio)")
    assert problem(film(3)) == (Reason.TOO_SHORT, "3 frames, which are fewer than a clip of 4 needs")
    assert len(of(film(3), ClipRule(4, tail="pad"))) == 1


def test_frames_that_are_too_large_are_refused_before_they_are_decoded() -> None:
    least = Preprocessing(size=32, max_memory_bytes=1_000_000)
    side = int((1_000_000 / FRAME_BYTES) ** 0.5)
    assert len(of(film(4, (side // 2 * 2, side // 2 * 2)), preprocessing=least)) == 1
    reason, detail = problem(film(4, (side + 60, side + 60)), preprocessing=least)
    assert reason is Reason.TOO_MANY_PIXELS
    assert f"{side + 60} x {side + 60} a frame" in detail


def test_an_attached_picture_is_no_video() -> None:
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(film(5, codec="libx264", form="yuv420p", kind="mp4"))) as source,
        av.open(file, "w", format="mp4") as target,
    ):
        cover: Any = target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = target.add_stream_from_template(source.streams.video[0])
        target.mux(cover.encode(VideoFrame(640, 480, "yuvj420p")))
        target.mux(cover.encode())
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    video = VideoClips(file.getvalue(), EACH, SMALL)
    assert len(list(video)) == 1
    assert video.findings.width == 64


def test_a_frame_that_grows_too_large_in_the_middle_ends_the_video_with_a_warning() -> None:
    options = {"codec": "mpeg2video", "kind": "mpegts", "form": "yuv420p", "rate": 25, "options": {}}
    joined = film(12, (64, 48), **options) + film(12, (640, 480), **options)
    video = VideoClips(joined, EACH, Preprocessing(size=16, max_memory_bytes=1_000_000))
    assert 2 <= len(list(video)) <= 3
    found = video.warning()
    assert found is not None
    assert found.reason is Reason.PARTLY_DECODED
