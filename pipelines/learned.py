"""Measures that look through other people's networks, for `evaluate`: LPIPS and rFID, from weights on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenizer.evaluation import Measured
from tokenizer.frechet import Moments, frechet_distance, load_inception
from tokenizer.losses import to_bytes
from tokenizer.lpips import load_lpips
from vqmill.errors import UsageError


class LearnedMeasures:
    """LPIPS and rFID of a stream of images; neither is there unless its weights are named.

    Args:
        lpips: the weights of the differences, see `load_lpips`.
        backbone: the network's own; from torch's cache if None.
        rfid: see `load_inception`.
        device: where to compute.

    Raises:
        UsageError: a file is missing or not what is expected, or a backbone is named without --lpips.
    """

    def __init__(self, lpips: Path | None, backbone: Path | None, rfid: Path | None, device: str) -> None:
        if backbone and not lpips:
            raise UsageError(
                f"--lpips-backbone {backbone}: only together with --lpips, the weights of the differences."
            )
        self._lpips = load_lpips(lpips, backbone).to(device) if lpips else None
        self._inception = load_inception(rfid).to(device) if rfid else None
        self._distance, self._images = 0.0, 0
        self._originals, self._reconstructions = Moments(), Moments()
        self.settings = {
            "lpips": _sha256(lpips), "lpips_backbone": _sha256(backbone), "rfid": _sha256(rfid),
        }  # fmt: skip

    def add(self, measured: Measured) -> None:
        """Takes up a batch."""
        self._images += len(measured.images)
        if self._lpips:
            self._distance += float(self._lpips(measured.images, measured.reconstructions).sum())
        if self._inception:
            self._originals.add(self._inception(to_bytes(measured.images)))
            self._reconstructions.add(self._inception(to_bytes(measured.reconstructions)))

    def report(self) -> dict[str, float]:
        """`lpips`, the mean over images, and `rfid`: those that were asked for.

        Raises:
            UsageError: rFID of a single image.
        """
        found = {}
        if self._lpips:
            found["lpips"] = self._distance / self._images
        if self._inception:
            found["rfid"] = frechet_distance(self._originals.result(), self._reconstructions.result())
        return found


def _sha256(path: Path | None) -> str | None:
    """Of a file's content, so that an output remembers the weights it was made with."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
