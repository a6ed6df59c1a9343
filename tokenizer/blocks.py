"""The residual block of van den Oord et al. 2017, which encoders and decoders share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))) (van den Oord et al. 2017, section 4.1); with `rectified_skip` relu(x) + ...."""

    def __init__(self, hidden_dim: int, residual_dim: int, *, bias: bool = True, rectified_skip: bool = False) -> None:
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv3 = nn.Conv2d(hidden_dim, residual_dim, 3, padding=1, bias=bias)
        self.conv1 = nn.Conv2d(residual_dim, hidden_dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features, float [N, hidden_dim, h, w] -> the same shape."""
        rectified = F.relu(x)
        return (rectified if self.rectified_skip else x) + self.conv1(F.relu(self.conv3(rectified)))


def residual_stack(
    hidden_dim: int, residual_dim: int, num_blocks: int, *, bias: bool = True, rectified_skip: bool = False
) -> nn.Sequential:
    """Residual blocks in a row, then a ReLU (the blocks themselves end linear)."""
    blocks = [
        ResidualBlock(hidden_dim, residual_dim, bias=bias, rectified_skip=rectified_skip) for _ in range(num_blocks)
    ]
    return nn.Sequential(*blocks, nn.ReLU())
