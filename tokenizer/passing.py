"""How gradients pass a quantizer: values are the entries, bit for bit; gradients go to the features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pass_gradient(z: Tensor, entries: Tensor, *, rotation: bool) -> Tensor:
    """The entries, with a gradient towards the features.

    Args:
        z: float32 [N, D, ...], features.
        entries: float32 [N, D, ...], what they were quantized to; without gradient.
        rotation: False passes gradients straight through (Bengio et al. 2013); True turns and scales them as z was turned and scaled to
            become its entry (Fifty et al. 2024, "Restructuring vector quantization with the rotation trick", section 4.2).

    Returns:
        float32 [N, D, ...], equal to `entries`.
    """
    return _StraightThrough.apply(_rotated(z, entries) if rotation else z, entries)  # pyright: ignore[reportReturnType]


class _StraightThrough(torch.autograd.Function):
    """sg(entries) + (z - sg(z)), without the two passes over memory that computing it would take."""

    @staticmethod
    def forward(z: Tensor, entries: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return entries.view_as(entries)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def _rotated(z: Tensor, entries: Tensor) -> Tensor:
    """λ R z: R turns z's direction into the entry's (two reflections), λ is the ratio of lengths; both are constants to autograd."""
    with torch.no_grad():
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp(min=1e-6)
        scale = torch.linalg.vector_norm(entries, dim=1, keepdim=True) / length
        source, target = z / length, F.normalize(entries, dim=1)
        middle = F.normalize(source + target, dim=1)
    turned = z - 2 * _dot(middle, z) * middle + 2 * _dot(source, z) * target
    return scale * turned


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=1, keepdim=True)
