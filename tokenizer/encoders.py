"""Strided convolutions from pixels (or features) down to the grid of a level."""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.blocks import residual_stack


class QuarterEncoder(nn.Module):
    """Halves the image twice: [N, C, H, W] -> [N, hidden_dim, H/4, W/4] (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, channels: int, hidden_dim: int, residual_dim: int, num_residual_blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden_dim // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim // 2, hidden_dim, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            residual_stack(hidden_dim, residual_dim, num_residual_blocks),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layers(x)


class HalfEncoder(nn.Module):
    """Halves a feature map once: [N, hidden_dim, h, w] -> [N, hidden_dim, h/2, w/2] (Razavi et al. 2019, top encoder)."""

    def __init__(self, hidden_dim: int, residual_dim: int, num_residual_blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            residual_stack(hidden_dim, residual_dim, num_residual_blocks),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layers(x)
