"""k-means++ seeding and Lloyd's iterations: where new codebook entries come from."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.search import nearest


def seed_entries(points: Tensor, num_entries: int, generator: torch.Generator, known: Tensor | None = None) -> Tensor:
    """Draws points to become entries, each with a probability proportional to its squared distance from all entries so far.

    That is k-means++ (Arthur & Vassilvitskii 2007), in rounds (as Bahmani et al. 2012 have it): a round draws, without putting back, one
    point for every sixteen entries that there are, so that thousands do not take thousands of passes over the points. Points that an
    entry already stands for are not drawn again, which matters on images, where flat areas make most encoder outputs equal.

    Args:
        points: float [P, D] on the CPU, P >= 1.
        num_entries: how many to draw; when all points are taken, some are drawn twice.
        generator: a CPU generator.
        known: entries [E, D] that there are already; none makes the first draw uniform.

    Returns:
        float [num_entries, D], rows of `points`.
    """
    newest = points[:0] if known is None else known
    distances = torch.ones(len(points)) if len(newest) == 0 else torch.full((len(points),), torch.inf)
    entries, drawn = len(newest), [points[:0]]
    while num_entries > 0:
        if len(newest):
            distances = torch.minimum(distances, (points - newest[nearest(points, newest)]).square().sum(dim=1))
        drawn_now = points[_draw(distances, min(num_entries, max(1, entries // 16)), generator)]
        newest = (
            drawn_now.unique(dim=0) if distances.max() > 0 else drawn_now
        )  # equal ones only where no others are left
        if entries == 0:
            distances.fill_(torch.inf)
        entries, num_entries = entries + len(newest), num_entries - len(newest)
        drawn.append(newest)
    return torch.cat(drawn)


def _draw(weights: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Different indices with probabilities proportional to their weights (Efraimidis & Spirakis 2006), at most as many as there are."""
    waiting = torch.empty_like(weights).exponential_(generator=generator)
    shares = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # where all points are taken, all are as good
    return (shares / waiting).topk(min(number, len(weights))).indices


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
