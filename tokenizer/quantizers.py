"""Vector quantization with a codebook that follows the encoder by moving averages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.kmeans import cluster_statistics, refine_entries, seed_entries
from tokenizer.search import nearest

LLOYD_ITERATIONS = 5  # after k-means++ seeding; more changes the distortion by little


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a feature map.

    Attributes:
        vectors: float32 [N, D, h, w], the codebook entries; gradients pass straight through to the features.
        codes: int64 [N, h, w] in [0, K).
        loss: scalar, mean squared distance of the features from their entries; its gradient moves the features only.
        counts: float32 [K], how often each code was used here.
        sums: float32 [K, D], the sum of the features that went to each code.
        pool: float32 [P, D], some of the features, from which unused codes may be revived.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    counts: Tensor
    sums: Tensor
    pool: Tensor


class EMAQuantizer(nn.Module):
    """A codebook whose entries are moving averages of the features assigned to them (van den Oord et al. 2017, appendix A.1).

    `forward` is pure; `update`, called after the optimizer's step with statistics added over micro-batches and ranks, moves the
    codebook. Its life has two parts:

    1. Updates before `start_step`: in training mode features pass unquantized with a loss of 0, so that the network learns as a
       plain autoencoder. (In evaluation mode features are always quantized.)
    2. Update `start_step` makes the codebook from the pool by k-means++ and Lloyd's iterations. From then on updates average:
       counts and sums start at zero with that first observation, so the bias of a young average is equal in both and cancels in
       entry = sum / count. A code used less than `revive_fraction` of the mean takes a feature from the pool, drawn by the k-means++
       rule: vector, count and sum together.

    Everything is float32, also under autocast. All state is in buffers.

    Args:
        codebook_size: K.
        code_dim: D.
        ema_decay: what an update keeps of counts and sums.
        start_step: see above, at least 1.
        revive_fraction: see above; 0 revives nothing.
        pool_size: features that `forward` offers in `Quantized.pool`, at most.
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    num_updates: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        ema_decay: float = 0.99,
        start_step: int = 100,
        revive_fraction: float = 0.03,
        pool_size: int = 4096,
    ) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        self.start_step = start_step
        self.revive_fraction = revive_fraction
        self.pool_size = pool_size
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("ema_counts", torch.zeros(codebook_size))
        self.register_buffer("ema_sums", torch.zeros(codebook_size, code_dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.codebook.shape[0]

    def encode(self, z: Tensor) -> Tensor:
        """The codes of a feature map, always quantizing: float [N, D, h, w] -> int64 [N, h, w]."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return nearest(_rows(z), self.codebook).view(z.shape[0], *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """The entries of codes: int64 [N, h, w] in [0, K) -> float32 [N, D, h, w]."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes features; pure. See `Quantized`.

        Args:
            z: float [N, D, h, w].
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.encode(z)
            entries = self.decode(codes)
            vectors = entries + (z - z.detach())  # the second term is 0, so the value is the entry, bit for bit
            loss = F.mse_loss(z, entries)
            if self.training:
                started = self.num_updates >= self.start_step
                vectors = torch.where(started, vectors, z)
                loss = loss * started
            rows = _rows(z.detach())
            counts, sums = cluster_statistics(rows, codes.flatten(), self.codebook_size)
            return Quantized(vectors, codes, loss, counts, sums, self._pool(rows))

    def _pool(self, rows: Tensor) -> Tensor:
        """At most `pool_size` rows, at random places that are the same in every call, so that `forward` stays pure.

        Not every n-th row: that would see only some columns of the grid.
        """
        if len(rows) <= self.pool_size:
            return rows.clone()
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: self.pool_size]
        return rows[places.to(rows.device)]

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, pool: Tensor, generator: torch.Generator) -> None:
        """Moves the codebook by one step's statistics. Equal arguments give equal bits on every rank.

        Args:
            counts: float32 [K], `Quantized.counts` added over micro-batches and ranks.
            sums: float32 [K, D], likewise.
            pool: float32 [P, D], `Quantized.pool` concatenated over them, P >= 1.
            generator: a CPU generator in the same state on all ranks.
        """
        self.num_updates += 1
        num_updates = int(self.num_updates)
        if num_updates < self.start_step:
            return
        if num_updates == self.start_step:
            points = self._thinned(pool, generator)
            entries = seed_entries(points, self.codebook_size, generator)
            entries, counts, sums = refine_entries(points, entries, LLOYD_ITERATIONS)
            self.codebook.copy_(entries)
        self.ema_counts.lerp_(counts.to(self.ema_counts), 1 - self.ema_decay)
        self.ema_sums.lerp_(sums.to(self.ema_sums), 1 - self.ema_decay)
        used = self.ema_counts[:, None] > 0
        self.codebook.copy_(torch.where(used, self.ema_sums / self.ema_counts[:, None], self.codebook))
        self._revive(pool, generator)

    def _revive(self, pool: Tensor, generator: torch.Generator) -> None:
        mean = self.ema_counts.mean()
        dead = self.ema_counts < self.revive_fraction * mean
        num_dead = int(dead.sum())
        if num_dead == 0:
            return
        vectors = seed_entries(self._thinned(pool, generator), num_dead, generator, self.codebook[~dead].cpu())
        vectors = vectors.to(self.codebook)
        self.codebook[dead] = vectors
        self.ema_counts[dead] = mean
        self.ema_sums[dead] = vectors * mean

    def _thinned(self, pool: Tensor, generator: torch.Generator) -> Tensor:
        """At most 32 K features of the pool, on the CPU: many ranks must not make k-means slow."""
        chosen = torch.randperm(len(pool), generator=generator)[: 32 * self.codebook_size]
        return pool.detach().cpu()[chosen]

    @torch.no_grad()
    def sort_by_usage(self) -> None:
        """Renumbers the codes so that 0 is the most used (ties in their old order): sorted codes compress better.

        Called once, when training ends: codes made before mean something else afterwards.
        """
        order = torch.argsort(self.ema_counts, descending=True, stable=True)
        for buffer in (self.codebook, self.ema_counts, self.ema_sums):
            buffer.copy_(buffer[order])


def _rows(z: Tensor) -> Tensor:
    """[N, D, h, w] -> float32 [N*h*w, D]."""
    return z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
