"""k-means++ seeding and Lloyd's iterations: where new codebook entries come from."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.search import nearest


def seed_entries(points: Tensor, num_entries: int, generator: torch.Generator, known: Tensor | None = None) -> Tensor:
    """Draws points to become entries, each with a probability proportional to its squared distance from all entries so far.

    That is k-means++ (Arthur & Vassilvitskii 2007). Points that an entry already stands for are not drawn again, which matters on
    images, where flat areas make most encoder outputs equal.

    Args:
        points: float [P, D] on the CPU, P >= 1.
        num_entries: how many to draw; when all points are taken, some are drawn twice.
        generator: a CPU generator.
        known: entries [E, D] that there are already; none makes the first draw uniform.

    Returns:
        float [num_entries, D], rows of `points`.
    """
    if known is None or len(known) == 0:
        distances = torch.full((len(points),), torch.inf)
    else:
        distances = (points - known[nearest(points, known)]).square().sum(dim=1)
    drawn = []
    for _ in range(num_entries):
        chosen = points[_draw(distances, generator)]
        distances = torch.minimum(distances, (points - chosen).square().sum(dim=1))
        drawn.append(chosen)
    return torch.stack(drawn) if drawn else points[:0]


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index with probability proportional to its weight; uniform when the weights say nothing (all infinite or all zero)."""
    cumulative = weights.double().cumsum(0)
    total = float(cumulative[-1])
    if not 0 < total < float("inf"):
        return int(torch.randint(len(weights), (), generator=generator))
    place = torch.rand((), generator=generator, dtype=torch.float64) * total
    return min(int(torch.searchsorted(cumulative, place, right=True)), len(weights) - 1)


def refine_entries(points: Tensor, entries: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's iterations: every entry moves to the mean of its points; one without points stays.

    Returns:
        Entries [K, D] and, for them, how many points each has [K] and the sums of these points [K, D].
    """
    for _ in range(num_iterations):
        counts, sums = cluster_statistics(points, nearest(points, entries), len(entries))
        entries = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), entries)
    return entries, *cluster_statistics(points, nearest(points, entries), len(entries))


def cluster_statistics(points: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many points each code has, float32 [K], and their sums, float32 [K, D].

    Args:
        points: float32 [M, D].
        codes: int64 [M] in [0, K).
        codebook_size: K.
    """
    counts = torch.zeros(codebook_size, device=points.device)
    sums = torch.zeros(codebook_size, points.shape[1], device=points.device)
    counts.index_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
    sums.index_add_(0, codes, points)
    return counts, sums
