"""Nearest codebook entries, without ever holding more than one cache-sized block of distances."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18  # scores held at a time: 1 MiB of float32, which stays in a core's cache
BLOCK_SCORES_DEVICE = 1 << 26  # on an accelerator, large enough to fill it


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Which entry lies nearest to each vector, by Euclidean distance; the lowest index wins ties.

    |z - c|^2 = |z|^2 - 2 (z . c - |c|^2 / 2), so the nearest entry has the highest z . c - |c|^2 / 2.

    Args:
        z: float32 [M, D].
        codebook: float32 [K, D].

    Returns:
        int64 [M] in [0, K).

    >>> nearest(torch.tensor([[0.9], [-3.0]]), torch.tensor([[0.0], [1.0], [1.0]]))
    tensor([1, 0])
    """
    num_vectors, codebook_size = len(z), len(codebook)
    codes = torch.empty(num_vectors, dtype=torch.int64, device=z.device)
    half_norms = codebook.square().sum(dim=1).mul_(-0.5)
    limit = BLOCK_SCORES if z.device.type == "cpu" else BLOCK_SCORES_DEVICE
    rows = max(1, limit // codebook_size)
    scores = torch.empty(min(rows, num_vectors), codebook_size, device=z.device)
    for start in range(0, num_vectors, rows):
        block = z[start : start + rows]
        out = scores[: len(block)]
        torch.addmm(half_norms, block, codebook.T, out=out)
        codes[start : start + rows] = out.argmax(dim=1)  # argmax gives the first of equal maxima
    return codes
