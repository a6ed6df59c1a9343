"""Finite scalar quantization: each dimension of a feature is rounded to one of a few values; there is no codebook to learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.passing import pass_gradient
from tokenizer.quantized import Quantized, Quantizer

MARGIN = 1e-3  # how far beyond the outermost values the squeezed range goes, so that features at infinity round to them


class FSQuantizer(Quantizer):
    """Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made simple", section 3.1.

    A code is a number in mixed radix, the first dimension its lowest digit. Nothing is updated, so there is nothing to collapse.

    Args:
        levels: how many values each dimension can take; K is their product, D their number.
    """

    sizes: Tensor
    radix: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.codebook_size = math.prod(levels)
        sizes = torch.tensor(list(levels))
        self.register_buffer("sizes", sizes)
        self.register_buffer("radix", torch.cat([torch.ones(1, dtype=torch.int64), sizes.cumprod(0)[:-1]]))

    def encode(self, z: Tensor) -> Tensor:
        """See `Quantizer`."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            half = (self.sizes // 2)[:, None, None]
            rounded = (
                self._bounded(z.float()).nan_to_num().round().long()
            )  # codes are in range whatever the features are
            digits = rounded.add(half).clamp(min=torch.zeros_like(half), max=self.sizes[:, None, None] - 1)
            return (digits * self.radix[:, None, None]).sum(dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer`; in [-1, 1]."""
        sizes, radix = self.sizes[:, None, None], self.radix[:, None, None]
        half = sizes // 2
        return ((codes[:, None] // radix) % sizes - half).float() / half

    def forward(self, z: Tensor) -> Quantized:
        """See `Quantizer`. The loss is 0; there are counts, but no sums and no pool."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.encode(z)
            vectors = pass_gradient(
                self._bounded(z) / (self.sizes // 2)[:, None, None], self.decode(codes), rotation=False
            )
            counts = torch.bincount(codes.flatten(), minlength=self.codebook_size).float()
            nothing = z.new_zeros(0)
            return Quantized(vectors, codes, z.new_zeros(()), counts, nothing, nothing)

    def _bounded(self, z: Tensor) -> Tensor:
        """Features squeezed so that rounding gives -(L // 2) ... (L - 1) // 2 (appendix A.1).

        The margin is absolute here: one in proportion to L would round to a value too many from L = 1002 on.
        """
        sizes = self.sizes[:, None, None]
        half = (sizes - 1) / 2 + MARGIN
        offset = (sizes % 2 == 0) * 0.5
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset
