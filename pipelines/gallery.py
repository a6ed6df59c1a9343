"""The images that a tokenizer keeps worst and best, beside what it makes of them and where the error lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.pictures import Panel, Pixels, good_scale, side_by_side
from tokenizer.evaluation import Measured
from tokenizer.losses import to_bytes

SHOWN = 8  # images at either end
COLUMNS = 2
ERROR_GAIN = 4  # errors are drawn this much brighter: white is 64 grey levels off, or more


@dataclass(frozen=True)
class Exhibit:
    """One image.

    Attributes:
        psnr: in dB.
        name: of its sample.
        original: uint8 [C, S, S].
        reconstruction: uint8 [C, S, S].
    """

    psnr: float
    name: str
    original: Pixels
    reconstruction: Pixels


class Gallery:
    """Keeps the images of lowest and of highest PSNR among all that pass; of equal ones, those that came first are the lower."""

    def __init__(self) -> None:
        self._kept: list[Exhibit] = []  # from worst to best

    def add(self, names: Sequence[str], measured: Measured) -> None:
        """Takes up a batch and lets go what lies in the middle."""
        figures = measured.psnr.tolist()
        originals = to_bytes(measured.images).cpu().numpy()
        reconstructions = to_bytes(measured.reconstructions).cpu().numpy()
        new = map(Exhibit, figures, names, originals, reconstructions)
        kept = sorted([*self._kept, *new], key=lambda exhibit: exhibit.psnr)
        self._kept = kept if len(kept) <= 2 * SHOWN else kept[:SHOWN] + kept[-SHOWN:]

    @property
    def worst(self) -> list[Exhibit]:
        """Up to eight, the worst first."""
        return self._kept[: (len(self._kept) + 1) // 2]

    @property
    def best(self) -> list[Exhibit]:
        """Up to eight others, the best first."""
        return self._kept[: (len(self._kept) - 1) // 2 : -1]

    def draw(self) -> Image.Image:
        """Original | reconstruction | error, for the worst and then for the best; at least one image must have passed."""
        panels = []
        for title, exhibits in (("worst", self.worst), ("best", self.best)):
            if exhibits:
                original = np.stack([exhibit.original for exhibit in exhibits])
                reconstruction = np.stack([exhibit.reconstruction for exhibit in exhibits])
                panels += [
                    Panel(f"{title}: original", original),
                    Panel("reconstruction", reconstruction),
                    Panel(f"error x{ERROR_GAIN}", error_maps(original, reconstruction)),
                ]
        return side_by_side(panels, COLUMNS, good_scale(self._kept[0].original.shape[-1]))


def error_maps(originals: Pixels, reconstructions: Pixels) -> Pixels:
    """Absolute error, the mean of the channels, four times as bright: uint8 [N, C, H, W] twice -> uint8 [N, 1, H, W]."""
    error = np.abs(originals.astype(np.float32) - reconstructions).mean(axis=1, keepdims=True)
    return np.clip(ERROR_GAIN * error, 0, 255).round().astype(np.uint8)
