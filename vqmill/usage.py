"""How often each code occurs: what tells a living codebook from a dead one."""

from __future__ import annotations

from typing import Any

import numpy as np

DENSE_SIZE = 65_536  # above, only the codes that occur are kept: a codebook's size is a claim, and may be 2**32


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
