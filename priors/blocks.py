"""Small layers that the networks share, for maps float [N, C, h, w] and for single places float [N, C]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from priors.config import LevelShape


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position, so that positions stay apart (and causality holds)."""

    def forward(self, input: Tensor) -> Tensor:
        """The normalised features, float [N, C, ...], of the same shape."""
        if input.ndim == 2:
            return super().forward(input)
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that takes single places too, where a matrix product is much quicker than a convolution."""

    def __init__(self, depth_in: int, depth_out: int) -> None:
        super().__init__(depth_in, depth_out, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Float [N, depth_in, h, w] or [N, depth_in] -> the same with depth_out."""
        return F.linear(input, self.weight.flatten(1), self.bias) if input.ndim == 2 else super().forward(input)


class ResidualBlock(nn.Module):
    """A residual pair of convolutions that keeps the shape; with kernel 1 it keeps positions apart, and takes single places."""

    def __init__(self, depth: int, kernel: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(depth) if norm else nn.Identity()
        self.conv1, self.conv2 = (
            Pointwise(depth, depth) if kernel == 1 else nn.Conv2d(depth, depth, kernel, padding=kernel // 2) for _ in range(2)
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """The features with the block's correction added."""
        hidden = self.conv1(F.relu(self.norm(features)))
        return features + self.conv2(self.dropout(F.relu(hidden)))


class UpperCondition(nn.Module):
    """Turns the codes of a coarser level into features on a finer level's grid: int64 [N, h, w] -> float [N, depth, H, W]."""

    def __init__(
        self, upper: LevelShape, level: LevelShape, depth: int, num_blocks: int, norm: bool, dropout: float
    ) -> None:
        super().__init__()
        ratio = (level.grid[0] // upper.grid[0], level.grid[1] // upper.grid[1])
        self.embedding = nn.Embedding(upper.codebook_size, depth)
        self.blocks = nn.Sequential(*(ResidualBlock(depth, 3, norm, dropout) for _ in range(num_blocks)))
        # Kernel = stride: each of the finer codes under a coarse one gets weights of its own, and no edge is special.
        self.upsample = nn.ConvTranspose2d(depth, depth, ratio, stride=ratio)

    def forward(self, codes: Tensor) -> Tensor:
        """Features of every place of the finer grid."""
        return self.upsample(self.blocks(self.embedding(codes).permute(0, 3, 1, 2)))
