"""Residual quantization: each stage quantizes what the stages before left over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokenizer.passing import pass_gradient
from tokenizer.quantized import Quantized, Quantizer, rows_of, sample_rows
from tokenizer.quantizers import CodebookQuantizer


class ResidualQuantizer(Quantizer):
    """Q codebooks one behind the other (Zeghidour et al. 2021, "SoundStream", section III-C; Lee et al. 2022, "RQ-VAE").

    A feature's vector is the sum of its Q entries; gradients pass from the sum to the feature. Codes are [N, Q, h, w]. Statistics are those
    of the stages, stacked; the pool holds the features themselves, from which each stage's left-overs are worked out in `update`.

    Args:
        stages: quantizers of one K, D and recipe.
    """

    learned = True

    def __init__(self, stages: Iterable[CodebookQuantizer]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.codebook_size = self._all()[0].codebook_size

    def _all(self) -> list[CodebookQuantizer]:
        return list(self.stages)  # pyright: ignore[reportReturnType] - a ModuleList does not know what it holds

    @property
    def half_way(self) -> Tensor:
        """See `Quantizer`."""
        return self._all()[0].half_way

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer`; codes [N, Q, h, w]."""
        codes, left = [], z.float()
        for stage in self._all():
            codes.append(stage.encode(left))
            left = left - stage.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer`; codes [N, Q, h, w]."""
        return torch.stack([stage.decode(part) for stage, part in zip(self._all(), codes.unbind(1), strict=True)]).sum(
            0
        )

    def forward(self, z: Tensor) -> Quantized:
        """See `Quantizer`."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            left, outputs = z, []
            for stage in self._all():
                outputs.append(stage(left))
                left = left - stage.decode(outputs[-1].codes).detach()
            first = self._all()[0]
            codes = torch.stack([output.codes for output in outputs], dim=1)
            vectors = pass_gradient(z, self.decode(codes).detach(), rotation=first.recipe.rotation)
            if self.training and first.first_update:
                vectors = torch.where(first.num_updates >= first.first_update, vectors, z)
            return Quantized(
                vectors,
                codes,
                torch.stack([output.loss for output in outputs]).sum(),
                torch.stack([output.counts for output in outputs]),
                torch.stack([output.sums for output in outputs]),
                sample_rows(rows_of(z.detach()), first.recipe.pool_size),
            )

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, pool: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Moves all codebooks, the first stage first; see `Quantizer.update`. Counts are [Q, K], sums [Q, K, D]."""
        replaced = {}
        for number, stage in enumerate(self._all()):
            found = stage.update(counts[number], sums[number], pool, generator)
            replaced |= {f"stages.{number}.{name}": mask for name, mask in found.items()}
            features = pool.to(stage.codebook).T[None, :, :, None]  # [1, D, P, 1]
            pool = rows_of(features - stage.decode(stage.encode(features)))
        return replaced

    def sort_by_usage(self) -> None:
        """Renumbers the codes of every stage by their use."""
        for stage in self._all():
            stage.sort_by_usage()
