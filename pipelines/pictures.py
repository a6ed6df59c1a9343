"""Pictures for people: grids of images, of codes as colours, and panels side by side, saved as PNG with their settings inside."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pipelines.results import one_line
from vqmill import Codes
from vqmill.errors import UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.settings import refuse_other_settings

GOLDEN_RATIO = 0.618033988749895  # neighbouring codes get hues far apart
TEXT_KEY = "vqmill"
GAP = 2  # pixels between tiles
MARGIN = 12  # pixels around panels
TITLE = 22  # height of a title in pixels
LINE = 13  # height of a line of small text: captions and headings
SMALL = 11  # size of its letters
BAR = 14  # height of a bar of colours
LATIN = 0x180  # the letters below are in Pillow's own font
PAPER = (250, 250, 248)
INK = (40, 40, 48)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Panel:
    """A titled grid of images.

    Attributes:
        title: above the grid.
        images: uint8 [N, C, H, W] with one or three channels.
        captions: the lines of text below each image; cut to its width, the first line at its end and others at their beginning, since the
            keys of neighbours differ at their ends.
        headings: a line above each column, cut at its end.
    """

    title: str
    images: Pixels
    captions: Sequence[Sequence[str]] = ()
    headings: Sequence[str] = ()

    @property
    def caption_lines(self) -> int:
        """The most lines below an image."""
        return max(map(len, self.captions), default=0)


def code_colours(codes: np.ndarray[Any, Any], side: int) -> Pixels:
    """Each code as a block of its own colour.

    Args:
        codes: integers [N, h, w].
        side: height and width of the picture of one grid, pixels.

    Returns:
        uint8 [N, 3, side, side].
    """
    hue = (codes.astype(np.float64) * GOLDEN_RATIO) % 1.0 * 6.0
    value = 0.72 + 0.24 * ((codes.astype(np.int64) * 7919) % 11) / 10.0
    saturation = 0.55
    channels = []
    for shift in (5.0, 3.0, 1.0):  # the standard HSV to RGB formula, one channel at a time
        k = (shift + hue) % 6.0
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))
    colours = (np.stack(channels, axis=1) * 255).astype(np.uint8)  # [N, 3, h, w]
    rows = (np.arange(side) * codes.shape[1]) // side
    columns = (np.arange(side) * codes.shape[2]) // side
    return colours[:, :, rows][:, :, :, columns]


def image_grid(images: Pixels, columns: int, scale: int = 1, caption_lines: int = 0) -> Image.Image:
    """Images [N, C, H, W] in rows of `columns`, each pixel enlarged `scale` times, with room for so many lines below each."""
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    tall, wide = height * scale + GAP + caption_lines * LINE, width * scale + GAP
    sheet = Image.new("RGB", (columns * wide - GAP, rows * tall - GAP), PAPER)
    for index, image in enumerate(images):
        pixels = np.repeat(image, 3, axis=0) if channels == 1 else image
        tile = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        place = (index % columns * wide, index // columns * tall)
        sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), place)
    return sheet


def side_by_side(panels: Sequence[Panel], columns: int, scale: int = 1) -> Image.Image:
    """Panels from left to right, each with its title above, no narrower than that; their images are level with each other."""
    font = ImageFont.load_default(size=14)
    caption_lines = max(panel.caption_lines for panel in panels)
    head = TITLE + (LINE if any(panel.headings for panel in panels) else 0)
    grids = [_captioned(panel, columns, scale, caption_lines) for panel in panels]
    titles = [one_line(panel.title) for panel in panels]
    widths = [max(grid.width, math.ceil(font.getlength(title))) for title, grid in zip(titles, grids, strict=True)]
    width = MARGIN + sum(wide + MARGIN for wide in widths)
    sheet = Image.new("RGB", (width, head + 2 * MARGIN + max(grid.height for grid in grids)), PAPER)
    draw = ImageDraw.Draw(sheet)
    left = MARGIN
    for panel, title, grid, wide in zip(panels, titles, grids, widths, strict=True):
        draw.text((left, MARGIN - 2), title, INK, font)
        side = panel.images.shape[-1] * scale
        for column, heading in enumerate(panel.headings):
            _write(draw, left + column * (side + GAP), MARGIN + TITLE - 2, heading, side - 2 * GAP)
        sheet.paste(grid, (left, MARGIN + head))
        left += wide + MARGIN
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets from top to bottom."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def colour_bar(colours: Pixels, marks: Mapping[str, float]) -> Image.Image:
    """A bar of colours with words below.

    Args:
        colours: uint8 [pixels, 3], from left to right.
        marks: words, and where on the bar they begin, from 0 (left) to 1 (right).
    """
    ends = [
        place * len(colours) + 3 + ImageFont.load_default(size=SMALL).getlength(words) for words, place in marks.items()
    ]
    sheet = Image.new("RGB", (2 * MARGIN + math.ceil(max(len(colours), *ends)), BAR + LINE + MARGIN), PAPER)
    sheet.paste(Image.fromarray(np.repeat(colours[None], BAR, axis=0)), (MARGIN, 0))
    draw = ImageDraw.Draw(sheet)
    for words, place in marks.items():
        left = MARGIN + place * len(colours)
        draw.line([(left, BAR), (left, BAR + 3)], INK)
        draw.text((left + 3, BAR), words, INK, ImageFont.load_default(size=SMALL))
    return sheet


def row_captions(codes: Codes, rows: np.ndarray[Any, Any]) -> list[list[str]]:
    """What is written below the pictures of rows of a store, integers [n]: their numbers and their keys."""
    keys = codes.samples_at(rows)["key"].to_pylist()
    return [[f"row {row}", str(key)] for row, key in zip(rows, keys, strict=True)]


def fitting(text: str, width: int, *, keep_end: bool = False) -> str:
    """The text in one line of small letters, cut with `...` where it is wider.

    Args:
        text: anything; what would break the line, or not be seen, is escaped.
        width: in pixels.
        keep_end: cut at the beginning.
    """
    font, text = ImageFont.load_default(size=SMALL), one_line(text)
    kept = text[-2 * width :] if keep_end else text[: 2 * width]  # no letter is that narrow
    if kept == text and font.getlength(text) <= width:
        return text
    while kept and font.getlength(f"{kept}…") > width:
        kept = kept[1:] if keep_end else kept[:-1]
    return f"…{kept}" if keep_end else f"{kept}…"


def fits(text: str, side: int) -> bool:
    """Whether a caption or heading shows a text whole over an image `side` pixels wide: it is not cut, and the font has its letters."""
    return text == fitting(text, side - 2 * GAP) and all(ord(letter) < LATIN for letter in text)


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, text: str, width: int, *, keep_end: bool = False) -> None:
    draw.text((left, top), fitting(text, width, keep_end=keep_end), INK, ImageFont.load_default(size=SMALL))


def _captioned(panel: Panel, columns: int, scale: int, caption_lines: int) -> Image.Image:
    grid = image_grid(panel.images, columns, scale, caption_lines)
    draw = ImageDraw.Draw(grid)
    tall, side = (size * scale for size in panel.images.shape[2:])
    for index, caption in enumerate(panel.captions):
        left, top = index % columns * (side + GAP), index // columns * (tall + GAP + caption_lines * LINE) + tall
        for number, line in enumerate(caption):
            _write(draw, left, top + number * LINE, line, side - 2 * GAP, keep_end=number > 0)
    return grid


def code_panels(codes: Mapping[str, np.ndarray[Any, Any]], side: int) -> list[Panel]:
    """A panel of coloured codes for each level, drawn `side` pixels large.

    Args:
        codes: by level, integers [N, h, w], or [N, Q, h, w] with a panel for each of the Q stages of residual codes.
        side: height and width of the picture of one grid, pixels.
    """
    panels = []
    for level, values in codes.items():
        title = "codes" if level == "codes" else f"codes: {level}"
        if values.ndim == 3:
            panels.append(Panel(title, code_colours(values, side)))
            continue
        panels += [
            Panel(f"{title} {stage + 1}", code_colours(values[:, stage], side)) for stage in range(values.shape[1])
        ]
    return panels


def check_columns(columns: int | None) -> None:
    """Refuses a grid without columns.

    Raises:
        UsageError: fewer than one.
    """
    if columns is not None and columns < 1:
        raise UsageError(f"--columns must be at least 1, got {columns}.")


def good_scale(side: int) -> int:
    """How often to enlarge small images so that people can see them: to about 64 pixels a side."""
    return max(1, 64 // side)


def check_picture(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a place that a picture with other settings holds; call it before the work.

    Raises:
        UsageError: something else is there, or the name does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: pictures are written as PNG; choose a name that ends in .png.")
    if not path.exists():
        return
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            found = json.loads(picture.info[TEXT_KEY])
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path}: exists and is not a picture of vqmill's. Choose another --out, or remove it."
        ) from error
    refuse_other_settings(str(path), found, json.loads(canonical_json(settings)), "Choose another --out, or remove it.")


def save_picture(path: Path, picture: Image.Image, settings: Mapping[str, Any]) -> None:
    """Writes a PNG whole, with the settings that made it in a text chunk `vqmill`."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(TEXT_KEY, canonical_json(settings).decode())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=text, optimize=True)
    write_whole(path, buffer.getvalue())
