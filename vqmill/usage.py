"""How often each code occurs: what tells a living codebook from a dead one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vqmill.spec import LevelSpec

DENSE_SIZE = 65_536  # above, only the codes that occur are kept: a codebook's size is a claim, and may be 2**32
MOST_STAGES = 64  # that are counted one by one: a grid is a claim, too


class CodeUsage:
    """Counts of codes, added up chunk by chunk.

    >>> usage = CodeUsage(4)
    >>> usage.add(np.array([[0, 2], [2, 2]]))
    >>> usage.used, round(usage.perplexity, 2)
    (2, 1.75)
    """

    def __init__(self, codebook_size: int) -> None:
        self._dense = codebook_size <= DENSE_SIZE
        self._codes = np.arange(codebook_size if self._dense else 0)
        self._counts = np.zeros(len(self._codes), np.int64)

    def add(self, codes: np.ndarray[Any, Any]) -> None:
        """Counts codes, integers of any shape in 0..K-1."""
        if self._dense:
            self._counts += np.bincount(codes.reshape(-1), minlength=len(self._codes))
        else:
            self._join(*np.unique(codes, return_counts=True))

    def merge(self, other: CodeUsage) -> None:
        """Adds what another counted, of the same codebook."""
        if self._dense:
            self._counts += other._counts
        else:
            self._join(other._codes, other._counts)

    def _join(self, codes: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> None:
        self._codes, places = np.unique(
            np.concatenate([self._codes, codes.astype(self._codes.dtype)]), return_inverse=True
        )
        joined = np.zeros(len(self._codes), np.int64)
        np.add.at(joined, places, np.concatenate([self._counts, counts]))
        self._counts = joined

    @property
    def used(self) -> int:
        """How many codes occur."""
        return int(np.count_nonzero(self._counts))

    @property
    def perplexity(self) -> float:
        """2 to the entropy (bits) of the codes."""
        return perplexity(self._counts)


class StoreUsage:
    """How often each code of each level occurs; of residual codes those of each stage by themselves, see `counted_names`."""

    def __init__(self, levels: Sequence[LevelSpec]) -> None:
        self._names = {level.name: counted_names(level) for level in levels}
        self._counts = {name: CodeUsage(level.codebook_size) for level in levels for name in self._names[level.name]}

    def add(self, level: str, codes: np.ndarray[Any, Any]) -> None:
        """Counts codes of a level, integers [N, *grid] in 0..K-1."""
        names = self._names[level]
        for name, part in zip(names, [codes] if names == (level,) else codes.swapaxes(0, 1), strict=True):
            self._counts[name].add(part)

    def merge(self, other: StoreUsage) -> None:
        """Adds what another counted, of the same levels."""
        for name, counts in other._counts.items():
            self._counts[name].merge(counts)

    @property
    def used(self) -> dict[str, int]:
        """How many codes occur, by name."""
        return {name: counts.used for name, counts in self._counts.items()}

    @property
    def perplexity(self) -> dict[str, float]:
        """2 to the entropy (bits) of the codes, by name."""
        return {name: counts.perplexity for name, counts in self._counts.items()}


def counted_names(level: LevelSpec) -> tuple[str, ...]:
    """What is counted by itself: a level; or each stage of its residual codes, if they are not more than MOST_STAGES.

    >>> counted_names(LevelSpec("codes", 512, (2, 7, 7), outer="depth"))
    ('codes/0', 'codes/1')
    """
    if level.axes[1] != "depth" or level.grid[0] > MOST_STAGES:
        return (level.name,)
    return tuple(f"{level.name}/{stage}" for stage in range(level.grid[0]))


def title(name: str) -> str:
    """What figures are of, for people.

    >>> title("codes"), title("codes/0")
    ('level codes', 'level codes stage 1')
    """
    level, _, stage = name.partition("/")
    return f"level {level} stage {int(stage) + 1}" if stage else f"level {level}"


def perplexity(histogram: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """2 to the entropy of a histogram of codes: how many codes would carry as much, were all used equally. 0 when it is empty.

    >>> perplexity(np.array([5, 5, 0]))
    2.0
    """
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    share = histogram[histogram > 0] / total
    return float(2.0 ** -(share * np.log2(share)).sum())
