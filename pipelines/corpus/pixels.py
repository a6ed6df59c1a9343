"""Brings whatever pixels Pillow has to 8 bits in grey (`L`) or colour (`RGB`), with alpha (`RGBA`) where there is any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

BAND_PIXELS = 1 << 18
Values = NDArray[Any]


def to_8_bit(image: Image.Image, channels: int) -> Image.Image:
    """A loaded image in mode `L` (1 channel, or without colour), `RGB` (3 channels), or `RGBA` when parts of it are transparent.

    - 16 bits are scaled by 255/65535; Pillow's own conversion clips them to white.
    - 32-bit and floating-point pixels have no white of their own: their smallest finite value becomes black, their largest white.
    - CMYK, YCbCr, HSV and LAB become RGB. Embedded colour profiles are not applied.
    """
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    elif image.mode in ("I", "F"):
        image = _from_unscaled(image)
    elif image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, transform) or image
    if image.has_transparency_data:
        return _converted(image, "RGBA")
    if image.mode in ("1", "L"):
        return _converted(image, "L")
    # Grey is made of what is seen: palette and CMYK pixels pass through RGB.
    image = _converted(image, "RGB")
    return image if channels == 3 else image.convert("L")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Pillow makes a copy even of what has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    grey = _in_bands(image, lambda values: ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if not isinstance(clear, int):
        return grey
    return Image.merge(
        "LA", (grey, _in_bands(image, lambda values: np.where(values == clear, 0, 255).astype(np.uint8)))
    )


def _from_unscaled(image: Image.Image) -> Image.Image:
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # their 32-bit mode holds 16-bit pixels
        return _from_16_bit(image)
    low, high = np.inf, -np.inf
    for band in _bands(image):
        finite = band[np.isfinite(band)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    low, high = (low, high) if low <= high else (0.0, 1.0)
    factor = 255 / (high - low) if high > low else 0.0

    def scaled(values: Values) -> NDArray[np.uint8]:
        values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        return np.rint((values - low) * factor).astype(np.uint8)

    return _in_bands(image, scaled)


def _in_bands(image: Image.Image, convert: Callable[[Values], NDArray[np.uint8]]) -> Image.Image:
    """An `L` image of converted values, made a band of rows at a time: numpy's intermediate steps take several times its memory."""
    grey = Image.new("L", image.size)
    top = 0
    for band in _bands(image):
        grey.paste(Image.fromarray(convert(band)), (0, top))
        top += len(band)
    return grey


def _bands(image: Image.Image) -> Iterator[Values]:
    step = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, step):
        yield np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
