"""What decoding an image would take, reckoned from its header before any pixel is decoded: memory, and time where files can waste it.

The figures per pixel are peaks measured with Pillow 13, of Pillow, the decoders it calls, and what is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import ImageFile

from pipelines.corpus.problems import BadImage, Reason

MAX_SCANS = 100  # passes over a progressive JPEG; encoders make 10 to 20, and files of thousands keep a decoder busy for minutes
MAX_SLOW_PIXELS = 1 << 20
_SLOW_DECODERS = frozenset({"bmp_rle", "ppm", "ppm_plain"})  # those that Pillow has written in Python
_STORED = {
    "1": 1,
    "L": 1,
    "P": 1,
    "I;16": 2,
    "I;16L": 2,
    "I;16B": 2,
    "I;16N": 2,
}  # bytes of a pixel in Pillow's memory; others 4
_DECODER = {"WEBP": 12.2, "AVIF": 11.0, "TIFF": 4.0}  # bytes of a pixel beside it, while decoding
_DECODER_JPEG2000 = 5.2  # of a sample
_CONVERTED = {"1": 2, "L": 1, "P": 5, "RGB": 4, "RGBA": 8, "LA": 12, "PA": 12, "I": 5, "F": 5}  # with all steps after
_CONVERTED_OTHERS = 8
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF
_COPIED = 4  # bytes of a pixel that is seen


def check_cost(image: ImageFile.ImageFile, data: bytes, whole: tuple[int, int], visible: int, max_bytes: int) -> None:
    """Refuses what would take too long or too much memory.

    Args:
        image: opened, with its draft chosen, and not loaded.
        data: the file.
        whole: width and height as the header gives them, where the image has those of its draft.
        visible: pixels of the image, as a draft, that are not cut off.
        max_bytes: the memory allowed beside the file.

    Raises:
        BadImage: too_many_pixels or decode_error.
    """
    width, height = image.size
    if image.tile and image.tile[0][0] in _SLOW_DECODERS and width * height > MAX_SLOW_PIXELS:
        what = f"{width} x {height} pixels in a rare kind of {image.format}; at most {MAX_SLOW_PIXELS} are decoded"
        raise BadImage(Reason.TOO_MANY_PIXELS, what)
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
    if scans > MAX_SCANS:
        raise BadImage(Reason.DECODE_ERROR, f"JPEG: {scans} scans; at most {MAX_SCANS} are decoded")
    needed = _needed(image, whole, visible, several_scans=scans > 1)
    if needed > max_bytes:
        what = f"{whole[0]} x {whole[1]} pixels of {image.format} {image.mode} take {needed / 1e6:,.0f} MB to decode; at most {max_bytes / 1e6:,.0f} MB are given (--max-image-memory)"
        raise BadImage(Reason.TOO_MANY_PIXELS, what)


def _needed(image: ImageFile.ImageFile, whole: tuple[int, int], visible: int, *, several_scans: bool) -> float:
    """Bytes at the worst moment: while it is decoded, or while it is converted and cut out."""
    pixels = image.width * image.height
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_HEIGHT, 0)  # decoded whole, even where it is larger than the image
    decoding = max(pixels, tile) * (_STORED.get(image.mode, 4) + _DECODER.get(image.format or "", 0.0))
    if image.format == "JPEG2000":
        decoding += pixels * _DECODER_JPEG2000 * len(image.getbands())
    if several_scans:  # all coefficients are kept, 16 bits each
        decoding += 2 * whole[0] * whole[1] * _samples_per_pixel(image)
    converted = 3 if image.mode.startswith("I;16") else _CONVERTED.get(image.mode, _CONVERTED_OTHERS)
    if "transparency" in image.info:
        converted += 8 if image.mode != "P" else 4
    return max(decoding, pixels * converted + visible * _COPIED)


def _samples_per_pixel(image: ImageFile.ImageFile) -> float:
    """3 for a JPEG whose colours are stored as finely as its brightness, 1.5 for the usual one."""
    layers: list[tuple[int, int, int, int]] = getattr(image, "layer", [])  # (name, columns, rows, table)
    finest = max((columns * rows for _, columns, rows, _ in layers), default=1)
    return sum(columns * rows for _, columns, rows, _ in layers) / finest if layers else 4.0
