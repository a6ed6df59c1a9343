"""From decoded pixels to the square that a network sees: crop or pad, resize, turn upright, mirror."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

Fit = Literal["crop", "pad"]
Pixels = NDArray[np.uint8]
INTERPOLATION = (
    f"bicubic, antialiased, torch {torch.__version__} (with alpha, and where drafts are cut through pixels, pillow)"
)
BAND_BYTES = 1 << 20  # what is copied out of a large image at a time

# The EXIF values that show an image with its stored columns, or rows, in reverse.
_REVERSED_X = frozenset({2, 3, 7, 8})
_REVERSED_Y = frozenset({3, 4, 6, 7})
_SWAPPED = frozenset({5, 6, 7, 8})


def visible_box(
    whole: tuple[int, int], fit: Fit, position: float | None = None, orientation: int = 1
) -> tuple[int, int, int, int]:
    """What of an image is seen: (left, top, right, bottom) in its stored pixels.

    Args:
        whole: width and height as stored.
        fit: `pad` shows all, `crop` the square of the short side.
        position: of the square along the long side as it is seen, in [0, 1); None for the middle, its offset rounded down.
        orientation: the EXIF value.
    """
    width, height = whole
    if fit == "pad":
        return 0, 0, width, height
    short, spare = min(whole), abs(width - height)
    offset = spare // 2 if position is None else min(int(position * (spare + 1)), spare)
    if orientation in (_REVERSED_X if width > height else _REVERSED_Y):
        offset = spare - offset
    left, top = (offset, 0) if width > height else (0, offset)
    return left, top, left + short, top + short


def make_square(
    image: Image.Image | Pixels,
    box: tuple[float, float, float, float],
    size: int,
    background: tuple[int, int, int],
    channels: int,
    orientation: int = 1,
    flip: bool = False,
) -> Pixels:
    """Cuts a box out, resizes it until its long side is `size`, fills up with background, and turns it upright.

    Orientation, background and mirroring come last, on few pixels.

    Args:
        image: `L`, `RGB` or `RGBA`, or uint8 [H, W] or [H, W, 3].
        box: left, top, right, bottom in pixels of the image; of a draft it may cut through pixels.
        size: S.
        background: RGB in [0, 255], seen through transparent pixels and beside images that do not fill the square.
        channels: 1 or 3.
        orientation: the EXIF value.
        flip: mirrors left to right, as seen.

    Returns:
        uint8 [channels, S, S], contiguous.
    """
    left, top, right, bottom = box
    ratio = size / max(right - left, bottom - top)
    width, height = max(1, round((right - left) * ratio)), max(1, round((bottom - top) * ratio))
    if isinstance(image, Image.Image) and (image.mode == "RGBA" or any(edge % 1 for edge in box)):
        planes = _resize_by_pillow(image, box, (width, height), background, channels)
    else:
        planes = resize_planes(_pixels(image, (int(left), int(top), int(right), int(bottom))), width, height)
    planes = _upright(planes, orientation)
    planes = planes[:, :, ::-1] if flip else planes
    if len(planes) < channels:
        planes = np.repeat(planes, channels, axis=0)
    return pad_square(planes, size, background)


def resize_planes(pixels: Pixels, width: int, height: int) -> Pixels:
    """Bicubic, antialiased: uint8 [h, w, C] -> [C, height, width]; of four channels the last is Pillow's filling."""
    if pixels.shape[:2] != (height, width):
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        planes = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
        return planes[0, :3].numpy()
    return pixels.transpose(2, 0, 1)[:3]


def _pixels(image: Image.Image | Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """The pixels in a box, writable: [h, w, 1], [h, w, 3], or [h, w, 4] where Pillow's own memory is used as it lies."""
    left, top, right, bottom = box
    if not isinstance(image, Image.Image):
        pixels = image if image.ndim == 3 else image[:, :, None]
        pixels = pixels[top:bottom, left:right]
        return pixels if pixels.flags.writeable else pixels.copy()
    if image.mode == "RGB" and (shared := _shared(image)) is not None:
        return shared[top:bottom, left:right]
    # In bands: numpy and Pillow make two more copies of what is handed over at once.
    channels = len(image.getbands())
    pixels = np.empty((bottom - top, right - left, channels), np.uint8)
    step = max(1, BAND_BYTES // ((right - left) * 4))
    for first in range(0, len(pixels), step):
        last = min(first + step, len(pixels))
        band = image.crop((left, top + first, right, top + last))
        pixels[first:last] = np.asarray(band).reshape(last - first, right - left, channels)
    return pixels


def _shared(image: Image.Image) -> Pixels | None:
    """Pillow's memory of an `RGB` image [H, W, 4], not copied; None when it lies in several blocks."""
    try:
        flat = pa.array(image).values  # pyright: ignore[reportCallIssue, reportArgumentType] - the stubs know no __arrow_c_array__
    except ValueError:
        return None
    return torch.from_dlpack(flat).numpy().reshape(image.height, image.width, 4)


def _resize_by_pillow(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    background: tuple[int, int, int],
    channels: int,
) -> Pixels:
    """For what torch cannot do: boxes that cut through pixels, and alpha, with which no colour may leak out of pixels that are not seen."""
    square = image.resize(size, Image.Resampling.BICUBIC, box=box)
    if square.mode == "RGBA":
        ground = Image.new("RGBA", square.size, (*background, 255))
        square = Image.alpha_composite(ground, square).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(square)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _upright(planes: Pixels, orientation: int) -> Pixels:
    """[C, h, w] as it is to be seen."""
    if orientation in _REVERSED_X:
        planes = planes[:, :, ::-1]
    if orientation in _REVERSED_Y:
        planes = planes[:, ::-1]
    return planes.transpose(0, 2, 1) if orientation in _SWAPPED else planes


def pad_square(planes: Pixels, size: int, background: tuple[int, int, int]) -> Pixels:
    """In the middle of [C, size, size], offsets rounded down."""
    channels, height, width = planes.shape
    if (height, width) == (size, size):
        return np.ascontiguousarray(planes)
    ground = Image.new("RGB", (1, 1), background).convert("RGB" if channels == 3 else "L").getpixel((0, 0))
    square = np.empty((channels, size, size), np.uint8)
    square[:] = np.reshape(np.asarray(ground, np.uint8), (channels, 1, 1))
    top, left = (size - height) // 2, (size - width) // 2
    square[:, top : top + height, left : left + width] = planes
    return square


def swaps_sides(orientation: int) -> bool:
    """Whether an image with this EXIF value is as wide as it is stored high."""
    return orientation in _SWAPPED
