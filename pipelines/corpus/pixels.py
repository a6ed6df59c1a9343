"""Brings whatever pixels Pillow has to 8 bits in grey (`L`) or colour (`RGB`), with alpha (`RGBA`) where there is any."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms


def to_8_bit(image: Image.Image, channels: int) -> Image.Image:
    """A loaded image in mode `L` (1 channel), `RGB` (3), or `RGBA` when parts of it are transparent.

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
        return image.convert("RGBA")
    if channels == 1 and image.mode not in ("L", "RGB"):
        # Grey is made of what is seen: 1-bit, palette and CMYK pixels pass through RGB.
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _from_unscaled(image: Image.Image) -> Image.Image:
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # their 32-bit mode holds 16-bit pixels
        return _from_16_bit(image)
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (
        255 / (high - low) if high > low else 0.0
    )
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
