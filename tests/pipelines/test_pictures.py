"""Words in pictures: captions and headings are where they belong, within their width, and leave the pixels of images alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageChops

from pipelines.pictures import GAP, LINE, MARGIN, PAPER, TITLE, Panel, colour_bar, fits, fitting, side_by_side, stacked

IMAGES = np.full((5, 3, 40, 40), 200, np.uint8)


def ink(sheet, left: int, top: int, width: int, height: int) -> bool:
    """Whether anything but paper is there."""
    part = np.asarray(sheet)[top : top + height, left : left + width]
    assert part.shape == (height, width, 3)
    return bool((part != PAPER).any())


def test_captions_lie_below_their_images_and_all_panels_stay_level() -> None:
    captions = [["row 0", "a"], ["row 1", "b"], ["row 2", "c"], ["row 3"], []]
    sheet = side_by_side([Panel("a", IMAGES, captions), Panel("b", IMAGES)], columns=2)
    tall = 40 + GAP + 2 * LINE
    assert sheet.height == TITLE + 2 * MARGIN + 3 * tall - GAP
    panel = 2 * (40 + GAP) - GAP + MARGIN
    for index in range(5):
        left, top = MARGIN + index % 2 * (40 + GAP), MARGIN + TITLE + index // 2 * tall
        for first in (left, left + panel):
            assert (np.asarray(sheet)[top : top + 40, first : first + 40] == 200).all(), "no word on an image"
        lines = [ink(sheet, left, top + 40 + number * LINE, 40, LINE) for number in range(2)]
        assert lines == [len(captions[index]) > 0, len(captions[index]) > 1]
        assert not ink(sheet, left + panel, top + 40, 40, 2 * LINE), "the other panel has room, and no words"


def test_headings_stand_above_their_columns() -> None:
    plain, headed = (
        side_by_side([Panel("", IMAGES, headings=names)], columns=3) for names in ((), ("cat", "", "a" * 90))
    )
    assert headed.height == plain.height + LINE
    above = [ink(headed, MARGIN + column * (40 + GAP), MARGIN + TITLE, 40, LINE) for column in range(3)]
    assert above == [True, False, True]
    assert not ink(headed, MARGIN + 3 * (40 + GAP), 0, MARGIN - GAP, headed.height), "a long one is cut"
    below = headed.crop((0, MARGIN + TITLE + LINE, headed.width, headed.height))
    assert not ImageChops.difference(below, plain.crop((0, MARGIN + TITLE, plain.width, plain.height))).getbbox()


@pytest.mark.parametrize("width", [0, 5, 20, 60, 61, 200])
@pytest.mark.parametrize("text", ["", "i" * 500, "W" * 500, "class/sample-00012", "two\nlines\x00"])
def test_texts_are_cut_to_their_width(text: str, width: int) -> None:
    whole = text.replace("\n", "\\n").replace("\x00", "\\x00")
    start, end = fitting(text, width), fitting(text, width, keep_end=True)
    if start == whole:
        assert end == whole
        return
    assert whole.startswith(start.removesuffix("…"))
    assert whole.endswith(end.removeprefix("…"))
    assert (start[-1], end[0]) == ("…", "…")
    for found in (start, end):
        assert fitting(found, width) in (found, "…"), "what is cut fits"
    longer = whole[: len(start)] + "…"
    assert fitting(longer, width) != longer, "no more would fit"


def test_whether_a_name_is_shown_whole() -> None:
    assert fits("Trouser", 64)
    assert fits("Café", 64)
    assert not fits("Trouser", 20)
    assert not fits("日本", 64), "the font has no such letters"


def test_a_colour_bar_has_its_colours_and_words_below() -> None:
    colours = np.stack([np.arange(100), np.zeros(100), np.zeros(100)], 1).astype(np.uint8)
    bar = colour_bar(colours, {"0": 0.0, "end": 1.0})
    assert (np.asarray(bar)[0, MARGIN : MARGIN + 100] == colours).all()
    assert bar.width > 2 * MARGIN + 100, "as wide as its words"
    assert stacked([bar, bar]).size == (bar.width, 2 * bar.height)
