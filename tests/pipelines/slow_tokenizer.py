"""A tokenizer of ours that takes its time, another one for each batch, so that spans arrive in another order each time."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import tokenizer

FOLDER = "VQMILL_TEST_TOKENIZER"  # names the tokenizer
SECONDS = 0.2  # at most, for a batch


class Slow:
    name = "slow"

    def __init__(self) -> None:
        self._model = tokenizer.load(Path(os.environ[FOLDER]))
        self.fingerprint, self.channels, self.size = self._model.fingerprint, self._model.channels, self._model.size
        self.levels = self._model.levels
        self._random = random.Random()  # differs from process to process

    def grid(self, level: str, size: int) -> tuple[int, ...]:
        return self._model.grid(level, size)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        time.sleep(self._random.uniform(0, SECONDS))
        return self._model.encode(images)

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        return self._model.decode(codes)

    def to(self, device: object) -> Slow:
        return self


make = Slow
