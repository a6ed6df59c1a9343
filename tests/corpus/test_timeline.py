"""Times of frames and cuts of clips, without a video: against the plainest words for the same thing."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.timeline import MAX_HOLD_SECONDS, ClipRule, Stamps, clips, held
from vqmill.errors import CodesError

LENGTHS = st.lists(st.fractions(Fraction(1, 90), 3, max_denominator=90), min_size=1, max_size=40)


def video(lengths: list[Fraction], start: Fraction = Fraction(0)) -> list[tuple[int, Fraction, Fraction]]:
    """Frames 0, 1, 2, ... each shown for its length."""
    times = [start + sum(lengths[:index]) for index in range(len(lengths))]
    return [(index, time, length) for index, (time, length) in enumerate(zip(times, lengths, strict=True))]


@given(LENGTHS, st.fractions(Fraction(1, 4), 60, max_denominator=12), st.fractions(0, 9, max_denominator=7))
def test_at_each_instant_the_frame_that_is_shown_then(lengths: list[Fraction], rate: Fraction, start: Fraction) -> None:
    frames = video(lengths, start)
    taken = [(shown.frame, instant) for shown in held(frames, rate) for instant in shown.instants]
    end, expected, number = start + sum(lengths), [], 0
    while (instant := start + number / rate) < end:
        expected.append((max(frame for frame, time, _ in frames if time <= instant), instant))
        number += 1
    assert taken == expected


@given(LENGTHS)
def test_without_a_rate_every_frame_once(lengths: list[Fraction]) -> None:
    frames = video(lengths)
    assert [(shown.frame, *shown.instants) for shown in held(frames, None)] == [
        (frame, time) for frame, time, _ in frames
    ]


def test_a_jump_of_the_times_begins_a_new_run() -> None:
    second, jump = Fraction(1), Fraction(MAX_HOLD_SECONDS)
    frames = [
        ("a", Fraction(0), second),
        ("b", jump, second),
        ("c", jump * 2 + 1, second),
        ("d", jump * 2 + 2, Fraction(10**9)),
    ]
    found = [(shown.frame, shown.run, len(shown.instants)) for shown in held(frames, Fraction(2))]
    assert found == [("a", 0, 20), ("b", 0, 2), ("c", 1, 2), ("d", 1, 20)], "10 s are held, and not a year at the end"
    slides = [("a", Fraction(0), Fraction(60)), ("b", Fraction(60), second)]
    assert [shown.run for shown in held(slides, Fraction(1))] == [0, 0], "a frame that says so is shown for as long"


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 12), st.sampled_from(["drop", "pad"]))
def test_clips_are_what_slices_are(number: int, size: int, stride: int, tail: Any) -> None:
    frames = [(index, Fraction(index), Fraction(index, 2), 0) for index in range(number)]
    found = list(clips(frames, ClipRule(size, None, stride, tail)))
    starts = range(0, max(0, number - size + 1), stride)
    expected = [list(range(start, start + size)) for start in starts]
    covered = starts[-1] + size if starts else 0
    following = starts[-1] + stride if starts else 0
    if tail == "pad" and number > max(covered, following):
        rest = list(range(following, number))
        expected.append(rest + [rest[-1]] * (size - len(rest)))
    assert [list(cut.frames) for cut in found] == expected
    assert [cut.index for cut in found] == list(range(len(expected)))
    for cut in found:
        assert cut.start == cut.frames[0]
        assert cut.times == tuple(Fraction(frame, 2) for frame in cut.frames)
        assert cut.padded == size - len(set(cut.frames))


def test_clips_stay_within_a_run() -> None:
    frames = [(index, Fraction(index), Fraction(index), index // 5) for index in range(13)]
    whole = [cut.frames for cut in clips(frames, ClipRule(3))]
    assert whole == [(0, 1, 2), (5, 6, 7), (10, 11, 12)]
    padded = [cut.frames for cut in clips(frames, ClipRule(3, tail="pad"))]
    assert padded == [(0, 1, 2), (3, 4, 4), (5, 6, 7), (8, 9, 9), (10, 11, 12)]
    assert [cut.frames for cut in clips(frames, ClipRule(1, stride=7))] == [(0,), (5,), (10,)], (
        "a gap ends with its run"
    )


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ([(0, 0), (2, 2), (4, 4)], [0, 2, 4]),
        ([(None, 0), (None, 2), (None, 4)], [0, 2, 4]),
        ([(None, None)] * 3, [0, 2, 4]),
        ([(5, None), (5, None), (5, None), (11, None)], [5, 7, 9, 11]),
        ([(10, None), (0, None), (2, None), (90, None)], [10, 12, 14, 90]),
        ([(0, 0), (4, 2), (2, 4), (6, 6), (10, 8), (8, 10), (12, 12)], [0, 4, 6, 8, 10, 12, 14]),
    ],
    ids=["given", "decoding times", "none", "repeated", "back", "out of order"],
)
def test_times_grow_whatever_a_file_says(stamps: list[tuple[int | None, int | None]], times: list[int]) -> None:
    clock = Stamps(2)
    assert [clock(pts, dts, None)[0] for pts, dts in stamps] == times


def test_an_avi_goes_by_its_decoding_times() -> None:
    clock = Stamps(1, has_pts=False)
    found = [clock(pts, dts, 1)[0] for pts, dts in ((1, 1), (2, 2), (4, 3), (3, 4), (5, 5), (7, 6), (6, 7), (None, 8))]
    assert found == list(range(1, 9))
    assert clock.mended == 0


@given(st.lists(st.tuples(*[st.one_of(st.none(), st.integers(-9, 60))] * 3), max_size=40))
def test_times_always_grow(stamps: list[tuple[int | None, int | None, int | None]]) -> None:
    clock = Stamps(3)
    found = [clock(*stamp) for stamp in stamps]
    assert all(time < after for (time, _), (after, _) in itertools.pairwise(found))
    assert all(length > 0 for _, length in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "frames must be"),
        ({"frames": 5000}, "frames must be"),
        ({"rate": Fraction(0)}, "rate must be"),
        ({"rate": Fraction(1001)}, "rate must be"),
        ({"stride": 0}, "stride must be"),
        ({"tail": "keep"}, "tail must be"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CodesError, match=message):
        ClipRule(**wrong)
