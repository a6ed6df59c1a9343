"""What bits of rows say: how far each lies from the others, which lie at the ends, and where in a grid the bits are."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipelines.pictures import Pixels, colour_bar
from vqmill.spec import MISSING_LABEL

ROUNDING = (
    1e-6  # of the mean: networks in float32 differ by less from batch to batch, so a deviation below it says nothing
)
WHITE_BITS = (
    16.0  # the same in every picture, so that pictures can be compared; log2 K is 16 for the largest usual codebook
)

BAR_PIXELS = 256

Floats = np.ndarray[Any, np.dtype[np.float64]]


def z_scores(bits: Floats, groups: np.ndarray[Any, Any] | None = None) -> Floats:
    """How many standard deviations (of the population) each row lies above the mean of its group; 0 in a group of equal rows.

    >>> z_scores(np.array([1.0, 3.0, 7.0]), np.array([5, 5, 9]))
    array([-1.,  1.,  0.])

    Args:
        bits: float64 [N].
        groups: integers [N]; all rows are one group if not given.
    """
    places = np.zeros(len(bits), np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    number = np.bincount(places)
    mean = (np.bincount(places, bits) / number)[places]
    deviation = np.sqrt(np.bincount(places, (bits - mean) ** 2) / number)[places]
    equal = deviation <= ROUNDING * mean
    return np.where(equal, 0.0, (bits - mean) / np.where(equal, 1.0, deviation))


def has_peers(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows have a label that another row has, too.

    >>> has_peers(np.array([4, 7, 4, -1, -1]))
    array([ True, False,  True, False, False])
    """
    _, places, numbers = np.unique(labels, return_inverse=True, return_counts=True)
    return (numbers[places] > 1) & (labels != MISSING_LABEL)


def ends(bits: Floats, num: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Places of the rows with the most bits and of those with the fewest, int64, up to `num` each, the extreme first; no row is in both.

    >>> ends(np.array([5.0, 9.0, 1.0]), 8)
    (array([1, 0]), array([2]))
    """
    order = np.argsort(-bits, kind="stable")
    return order[: min(num, (len(bits) + 1) // 2)], order[::-1][: min(num, len(bits) // 2)]


def heat(bits: np.ndarray[Any, Any], side: int) -> Pixels:
    """Bits as colours: black for 0, over red and yellow to white for 16 and more.

    Args:
        bits: floats [N, h, w], of each code.
        side: height and width of the picture of one grid, pixels.

    Returns:
        uint8 [N, 3, side, side].
    """
    level = 3.0 * np.clip(bits.astype(np.float64) / WHITE_BITS, 0.0, 1.0)
    colours = np.stack([np.clip(level - shift, 0.0, 1.0) for shift in range(3)], axis=1)  # [N, 3, h, w]
    rows, columns = ((np.arange(side) * size) // side for size in bits.shape[1:])
    return (colours * 255).round().astype(np.uint8)[:, :, rows][:, :, :, columns]


def bits_bar() -> Image.Image:
    """What the colours of `heat` mean: from 0 to 16 bits per code."""
    bits = np.linspace(0.0, WHITE_BITS, BAR_PIXELS)[:, None, None]
    marks = {f"{bits:g}": bits / WHITE_BITS for bits in range(0, int(WHITE_BITS), 4)} | {
        f"{WHITE_BITS:g} bits per code, or more": 1.0
    }
    return colour_bar(heat(bits, 1)[:, :, 0, 0], marks)
