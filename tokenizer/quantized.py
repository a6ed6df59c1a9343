"""What every quantizer does, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a feature map.

    Attributes:
        vectors: float32 [N, D, h, w], the codebook entries; gradients pass to the features.
        codes: int64 [N, h, w] in [0, K); of a residual quantizer with Q stages [N, Q, h, w].
        loss: scalar: beta x the mean squared distance of the features from their entries, which moves the features; of a gradient
            codebook also that distance as the entries see it, which moves the entries (van den Oord et al. 2017, eq. 3).
        counts: float32 [K], how often each code was used here; residual [Q, K].
        sums: float32 [K, D], the sum of the features that went to each code; residual [Q, K, D]; empty where nothing is learned.
        pool: float32 [P, D], some of the features, from which codes are made and revived; empty where nothing is learned.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    counts: Tensor
    sums: Tensor
    pool: Tensor


class Quantizer(nn.Module, ABC):
    """Features to codes and back. `forward` is pure; only `update` moves anything.

    Attributes:
        codebook_size: K.
        learned: whether there is something to update.
    """

    codebook_size: int
    learned = False

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantizes features, float [N, D, h, w]; see `Quantized`."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """The codes of a feature map, also where training does not quantize yet: float [N, D, h, w] -> int64 [N, h, w]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The vectors of codes: int64 [N, h, w] in [0, K) -> float32 [N, D, h, w]."""

    @property
    def half_way(self) -> Tensor:
        """Bool scalar: half the updates before the codebooks' start are over."""
        return torch.ones((), dtype=torch.bool)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, pool: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Moves what is learned by one step's statistics. Equal arguments give equal bits on every rank.

        Args:
            counts: float32, `Quantized.counts` added over micro-batches and ranks.
            sums: float32, likewise.
            pool: float32 [P, D], `Quantized.pool` concatenated over them, P >= 1.
            generator: a CPU generator in the same state on all ranks.

        Returns:
            By name of a codebook, bool [K]: entries that were replaced, so that nothing which an optimizer knows of the old ones holds.
        """
        raise NotImplementedError(f"{type(self).__name__} learns nothing; look at `learned`.")

    def sort_by_usage(self) -> None:
        """Renumbers the codes so that 0 is the most used; nothing happens where codes have a meaning of their own."""


def rows_of(z: Tensor) -> Tensor:
    """[N, D, h, w] -> [N*h*w, D]."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def grid_of(rows: Tensor, shape: torch.Size) -> Tensor:
    """[N*h*w, D] -> [N, D, h, w] of a shape, channels last in memory: a view."""
    return rows.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def sample_rows(rows: Tensor, number: int) -> Tensor:
    """At most so many rows, at random places that are the same in every call, so that `forward` stays pure.

    Not every n-th row: that would see only some columns of the grid.
    """
    if len(rows) <= number:
        return rows.clone()
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:number]
    return rows[places.to(rows.device)]
