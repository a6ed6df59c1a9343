"""Real videos and hostile ones, against a slow decode that keeps everything."""

from __future__ import annotations

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.corpus.clips import VideoClips
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.problems import BadImage
from pipelines.corpus.timeline import ClipRule

pytestmark = pytest.mark.realdata
SIZE = 64
# dB against Pillow, which rounds between its passes; where pixels are not square, it also resizes twice, and we once.
EXACT, NEAR = 50.0, 26.0


def slow(path: Path) -> tuple[list[Image.Image], list[float]]:
    """All frames upright, and their times in the order of showing."""
    images, times = [], []
    with av.open(str(path)) as container:
        stream = max(
            (found for found in container.streams.video if "attached_pic" not in str(found.disposition)),
            key=lambda found: (bool(found.disposition.value & 1), found.width * found.height),
        )
        aspect = stream.sample_aspect_ratio or 1
        for frame in container.decode(stream):
            image = frame.to_image()
            image = image.resize((max(1, round(image.width * aspect)), image.height), Image.Resampling.BICUBIC)
            images.append(image.rotate(frame.rotation, expand=True))
            times.append(float(frame.pts * frame.time_base))
    return images, sorted(times)


def square(image: Image.Image) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = float(np.square(one.astype(float) - other.astype(float)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_every_video_gives_the_frames_and_times_of_a_slow_decode(real_data: Path) -> None:
    manifest = json.loads((real_data / "videos" / "manifest.json").read_text())
    assert len(manifest) == 30
    for name, facts in sorted(manifest.items()):
        path = real_data / "videos" / name
        video = VideoClips(path, ClipRule(1), Preprocessing(size=SIZE))
        clips = list(video)
        images, times = slow(path)
        assert len(clips) == len(images), name
        assert video.warning() is None, name
        assert video.findings.rotation == round(facts["rotation"]), name
        found = [clip.times[0] for clip in clips]
        assert found == pytest.approx(times, abs=1e-6), name
        plain = video.findings.pixel_aspect == 1
        for clip, image in list(zip(clips, images, strict=True))[:: max(1, len(clips) // 5)]:
            assert psnr(clip.pixels[0], square(image)) > (EXACT if plain else NEAR), name


def test_frames_at_a_rate_are_those_shown_at_each_instant(real_data: Path) -> None:
    for name in (
        "moviepy_no_duration.webm",
        "mmaction2_part_0.mp4",
        "decord_flipping_a_pancake.mkv",
        "mmaction2_test.avi",
    ):
        path = real_data / "videos" / name
        _, times = slow(path)
        found = list(VideoClips(path, ClipRule(4, Fraction(7), stride=3), Preprocessing(size=8)))
        for clip in found:
            for number, time_shown in enumerate(clip.times):
                instant = clip.start_seconds + number / 7
                assert time_shown == pytest.approx(max(time for time in times if time <= instant + 1e-9), abs=1e-6), (
                    name
                )
        assert [clip.start_seconds for clip in found] == pytest.approx(
            [times[0] + 3 * number / 7 for number in range(len(found))]
        ), name


HOSTILE = {
    "cosmos_video.mp4": "not_a_video",
    "decord_corrupted.mp4": "partly_decoded",
    "derived_no_moov.mp4": "truncated",
    "derived_resize_midstream.ts": "",
    "derived_text.mp4": "not_a_video",
    "derived_truncated_faststart.mp4": "partly_decoded",
    "derived_vfr.mp4": "",
    "moviepy_result.webm": "empty",
    "mp4parse_afconvert-aac-0.5s.mp4": "no_video",
    "mp4parse_bipbop-cenc-audioinit.mp4": "no_video",
    "mp4parse_bipbop_cbcs_video_init.mp4": "no_frames",
    "mp4parse_chunk_out_of_range.mp4": "truncated",
    "mp4parse_invalid_userdata.mp4": "no_frames",
    "mp4parse_short-cenc.mp4": "encrypted",
    "small_Mpeg4.mp4": "no_video",
    "small_mp4-with-audio.mp4": "no_video",
    "torchcodec_sine_mono_s16.wav": "decode_error",
}


def test_hostile_videos_give_clips_or_say_why(real_data: Path) -> None:
    assert {path.name for path in (real_data / "hostile" / "videos").iterdir()} == set(HOSTILE)
    for name, expected in HOSTILE.items():
        begun = time.monotonic()
        video = VideoClips(real_data / "hostile" / "videos" / name, ClipRule(4), Preprocessing(size=16))
        reason, clips = "", []
        try:
            clips += video
            reason = str(found.reason) if (found := video.warning()) else ""
        except BadImage as bad:
            reason = str(bad.reason)
        assert reason == expected, name
        assert bool(clips) == (reason in ("", "partly_decoded")), name
        assert time.monotonic() - begun < 20, name
