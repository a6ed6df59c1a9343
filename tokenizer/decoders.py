"""Transposed convolutions from code vectors up to features or pixels; the mirrors of encoders.py."""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.blocks import residual_stack


class QuarterDecoder(nn.Module):
    """Doubles the grid twice: [N, depth, h, w] -> [N, channels, 4h, 4w]."""

    def __init__(self, depth: int, channels: int, hidden_dim: int, residual_dim: int, num_residual_blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(depth, hidden_dim, 3, padding=1),
            residual_stack(hidden_dim, residual_dim, num_residual_blocks),
            nn.ConvTranspose2d(hidden_dim, hidden_dim // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden_dim // 2, channels, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layers(x)


class HalfDecoder(nn.Module):
    """Doubles the grid once: [N, depth, h, w] -> [N, hidden_dim, 2h, 2w]."""

    def __init__(self, depth: int, hidden_dim: int, residual_dim: int, num_residual_blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(depth, hidden_dim, 3, padding=1),
            residual_stack(hidden_dim, residual_dim, num_residual_blocks),
            nn.ConvTranspose2d(hidden_dim, hidden_dim, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layers(x)
