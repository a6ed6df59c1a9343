"""Vector quantization with a learned codebook: entries that follow the features by moving averages, or that gradients move."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.kmeans import cluster_statistics, refine_entries, seed_entries
from tokenizer.passing import pass_gradient
from tokenizer.quantized import Quantized, Quantizer, grid_of, rows_of, sample_rows
from tokenizer.search import nearest

MOST_REVIVED = 64  # codes in one update; the others can wait for the next
REVIVAL_POINTS = 1024  # that revived codes are drawn from: at least sixteen for each
LLOYD_ITERATIONS = 5  # after k-means++ seeding; more changes the distortion by little


@dataclass(frozen=True)
class Recipe:
    """How a codebook begins, and what is done about codes that are not used; fields as in `TokenizerConfig`."""

    codebook_start: str = "kmeans"
    start_step: int = 50
    revival: str = "rare"
    revive_fraction: float = 0.2
    revive_after: int = 100
    pool_size: int = 4096
    commitment_cost: float = 0.25
    ema_decay: float = 0.99
    normalize: bool = False
    rotation: bool = False


class CodebookQuantizer(Quantizer):
    """A codebook of K entries of width D. `forward` is pure; `update`, called after the optimizer's step, moves what is to move.

    With the k-means start its life has two parts:

    1. Updates before `start_step`: in training mode features pass unquantized with a loss of 0, so that the network learns as a
       plain autoencoder. (In evaluation mode features are always quantized.)
    2. Update `start_step` makes the codebook from the pool by k-means++ and Lloyd's iterations.

    Otherwise features are quantized from the beginning. Everything is float32, also under autocast.

    Args:
        codebook_size: K.
        code_dim: D.
        recipe: see there.
    """

    codebook: Tensor  # a buffer or a parameter, as the subclass has it
    ema_counts: Tensor
    idle_updates: Tensor
    num_updates: Tensor
    learned = True

    def __init__(self, codebook_size: int, code_dim: int, recipe: Recipe) -> None:
        super().__init__()
        self.codebook_size, self.recipe = codebook_size, recipe
        self.first_update = recipe.start_step if recipe.codebook_start == "kmeans" else 0
        self.register_buffer("ema_counts", torch.zeros(codebook_size))
        self.register_buffer("idle_updates", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        """Moves entries by one step's statistics, after `ema_counts` has moved."""

    @abstractmethod
    def _replace(self, chosen: Tensor, entries: Tensor) -> None:
        """Puts new entries [k, D] in the places that a mask [K] chooses, with whatever belongs to them."""

    @abstractmethod
    def _entries_loss(self, features: Tensor, entries: Tensor) -> Tensor:
        """The loss by which entries learn."""

    @property
    def entries(self) -> Tensor:
        """float32 [K, D]: what codes stand for; of length 1 when the recipe says so."""
        return F.normalize(self.codebook, dim=1) if self.recipe.normalize else self.codebook

    @property
    def half_way(self) -> Tensor:
        """See `Quantizer`."""
        return self.num_updates >= self.first_update // 2

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer`."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return nearest(self._rows(z), self.entries).view(z.shape[0], *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer`."""
        return F.embedding(codes, self.entries).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> Quantized:
        """See `Quantizer`."""
        with torch.autocast(z.device.type, enabled=False):
            rows, entries = self._rows(z), self.entries
            codes = nearest(rows.detach(), entries.detach())
            chosen = F.embedding(codes, entries)
            if self.training and self.num_updates < self.first_update:
                vectors = rows
                loss = 0 * entries.sum()  # the codebook is in it, because ranks wait for each weight's gradient
            else:
                vectors = pass_gradient(rows, chosen.detach(), rotation=self.recipe.rotation)
                loss = self.recipe.commitment_cost * F.mse_loss(rows, chosen.detach())
                loss = loss + self._entries_loss(rows.detach(), chosen)
            rows = rows.detach()
            counts, sums = cluster_statistics(rows, codes, self.codebook_size)
            pool = sample_rows(rows, self.recipe.pool_size)
            return Quantized(grid_of(vectors, z.shape), codes.view(z.shape[0], *z.shape[2:]), loss, counts, sums, pool)

    def _rows(self, z: Tensor) -> Tensor:
        rows = rows_of(z.float())
        return F.normalize(rows, dim=1) if self.recipe.normalize else rows

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, pool: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Moves the codebook; see `Quantizer.update`."""
        self.num_updates += 1
        num_updates = int(self.num_updates)
        replaced = torch.zeros_like(self.ema_counts, dtype=torch.bool)
        if num_updates < self.first_update:
            return {"codebook": replaced}
        if num_updates == self.first_update:
            replaced = ~replaced
            points = self._thinned(pool, 32 * self.codebook_size, generator)
            entries = seed_entries(points, self.codebook_size, generator)
            entries, counts, sums = refine_entries(points, entries, LLOYD_ITERATIONS)
            self._replace(replaced, entries.to(self.codebook))
        counts, sums = counts.to(self.ema_counts), sums.to(self.ema_counts)
        self.ema_counts.lerp_(counts, 1 - self.recipe.ema_decay)
        self.idle_updates.copy_((self.idle_updates + 1) * (counts == 0))
        self._follow(counts, sums)
        return {"codebook": replaced | self._revive(pool, generator)}

    def _revive(self, pool: Tensor, generator: torch.Generator) -> Tensor:
        """Gives codes that are of no use an entry out of the pool; says which."""
        mean = self.ema_counts.mean()
        if self.recipe.revival == "rare":
            dead = self.ema_counts < self.recipe.revive_fraction * mean
        elif self.recipe.revival == "unused":
            dead = self.idle_updates >= self.recipe.revive_after
        else:
            return torch.zeros_like(self.ema_counts, dtype=torch.bool)
        dead &= dead.cumsum(0) <= MOST_REVIVED
        num_dead = int(dead.sum())
        if num_dead == 0:
            return dead
        if self.recipe.revival == "rare":  # drawn by the k-means++ rule, far from the entries that live
            points = self._thinned(pool, REVIVAL_POINTS, generator)
            entries = seed_entries(points, num_dead, generator, self.entries[~dead].cpu())
        else:  # uniformly, as the source does
            entries = pool.cpu()[torch.randint(len(pool), (num_dead,), generator=generator)]
        self.ema_counts[dead] = mean
        self.idle_updates[dead] = 0
        self._replace(dead, entries.to(self.codebook))
        return dead

    def _thinned(self, pool: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """At most so many features of the pool, on the CPU: many ranks must not make k-means slow."""
        chosen = torch.randperm(len(pool), generator=generator)[:number]
        return pool.detach()[chosen.to(pool.device)].cpu()

    @torch.no_grad()
    def sort_by_usage(self) -> None:
        """Renumbers the codes so that 0 is the most used (ties in their old order): sorted codes compress better.

        Called once, when training ends: codes made before mean something else afterwards.
        """
        order = torch.argsort(self.ema_counts, descending=True, stable=True)
        for tensor in self.state_dict().values():
            if tensor.ndim:
                tensor.copy_(tensor[order])


class EMAQuantizer(CodebookQuantizer):
    """Entries are moving averages of the features assigned to them (van den Oord et al. 2017, appendix A.1).

    Counts and sums start at zero, so the bias of a young average is equal in both and cancels in entry = sum / count (sonnet divides it
    out of each; zalandoresearch's sums begin at random and are not debiased). An entry that was never used stays as it began. A revived
    code gets vector, count and sum together.
    """

    ema_sums: Tensor

    def __init__(self, codebook_size: int, code_dim: int, recipe: Recipe | None = None) -> None:
        super().__init__(codebook_size, code_dim, recipe or Recipe())
        self.register_buffer("codebook", first_entries(codebook_size, code_dim, self.recipe.codebook_start))
        self.register_buffer("ema_sums", torch.zeros(codebook_size, code_dim))

    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        self.ema_sums.lerp_(sums, 1 - self.recipe.ema_decay)
        used = self.ema_counts[:, None] > 0
        self.codebook.copy_(torch.where(used, self.ema_sums / self.ema_counts[:, None], self.codebook))

    def _replace(self, chosen: Tensor, entries: Tensor) -> None:
        self.codebook[chosen] = entries
        self.ema_sums[chosen] = entries * self.ema_counts[chosen, None]

    def _entries_loss(self, features: Tensor, entries: Tensor) -> Tensor:
        return torch.zeros((), device=features.device)


class GradientQuantizer(CodebookQuantizer):
    """Entries are weights that an optimizer moves towards their features (van den Oord et al. 2017, eq. 3); averages only count uses."""

    def __init__(self, codebook_size: int, code_dim: int, recipe: Recipe | None = None) -> None:
        super().__init__(codebook_size, code_dim, recipe or Recipe())
        self.codebook = nn.Parameter(first_entries(codebook_size, code_dim, self.recipe.codebook_start))

    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        """Nothing: the optimizer has moved them."""

    def _replace(self, chosen: Tensor, entries: Tensor) -> None:
        self.codebook[chosen] = entries

    def _entries_loss(self, features: Tensor, entries: Tensor) -> Tensor:
        return F.mse_loss(entries, features)


def first_entries(codebook_size: int, code_dim: int, start: str) -> Tensor:
    """A codebook of random numbers, float32 [K, D], from torch's global generator: uniform in [-1/K, 1/K], or standard normal."""
    if start == "uniform":
        return torch.empty(codebook_size, code_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
    return torch.randn(codebook_size, code_dim)
