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

from vqmill.errors import UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.settings import refuse_other_settings

GOLDEN_RATIO = 0.618033988749895  # neighbouring codes get hues far apart
TEXT_KEY = "vqmill"
GAP = 2  # pixels between tiles
MARGIN = 12  # pixels around panels
TITLE = 22  # height of a title in pixels
PAPER = (250, 250, 248)
INK = (40, 40, 48)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Panel:
    """A titled grid of images: uint8 [N, C, H, W] with one or three channels."""

    title: str
    images: Pixels


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


def image_grid(images: Pixels, columns: int, scale: int = 1) -> Image.Image:
    """Images [N, C, H, W] in rows of `columns`, each pixel enlarged `scale` times."""
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    tall, wide = height * scale + GAP, width * scale + GAP
    sheet = Image.new("RGB", (columns * wide - GAP, rows * tall - GAP), PAPER)
    for index, image in enumerate(images):
        pixels = np.repeat(image, 3, axis=0) if channels == 1 else image
        tile = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        place = (index % columns * wide, index // columns * tall)
        sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), place)
    return sheet


def side_by_side(panels: Sequence[Panel], columns: int, scale: int = 1) -> Image.Image:
    """Panels from left to right, each with its title above, no narrower than that."""
    font = ImageFont.load_default(size=14)
    grids = [(panel.title, image_grid(panel.images, columns, scale)) for panel in panels]
    widths = [max(grid.width, math.ceil(font.getlength(title))) for title, grid in grids]
    width = MARGIN + sum(wide + MARGIN for wide in widths)
    height = TITLE + 2 * MARGIN + max(grid.height for _, grid in grids)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    left = MARGIN
    for wide, (title, grid) in zip(widths, grids, strict=True):
        draw.text((left, MARGIN - 2), title, INK, font)
        sheet.paste(grid, (left, MARGIN + TITLE))
        left += wide + MARGIN
    return sheet


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
