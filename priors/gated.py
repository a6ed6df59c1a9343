"""The gated PixelCNN of one level: codes in, logits out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from priors.attention import PixelAttention
from priors.blocks import ChannelNorm, Pointwise, ResidualBlock
from priors.cached import GatedSession
from priors.config import LevelShape
from priors.network_config import PixelCNNConfig
from priors.pixelcnn import PixelCNN, PixelConvA, PixelConvB, PixelPosition


class GatedNetwork(nn.Module):
    """Embedded codes, a PixelCNN, and an output stack over both of its stacks.

    Args:
        config: sizes.
        shape: the grid of codes.
        conditioned: whether a condition of `config.depth` channels is given.
    """

    def __init__(self, config: PixelCNNConfig, shape: LevelShape, conditioned: bool) -> None:
        super().__init__()
        depth, self.grid = config.depth, shape.grid
        cond_depth = depth if conditioned else None
        reach = {"horizontal": config.horizontal, "vertical": config.vertical}
        options: dict[str, Any] = {
            **reach, "norm": config.norm, "vertical_residual": config.vertical_residual, "dropout": config.dropout,
        }  # fmt: skip
        layers: list[nn.Module] = [PixelConvA(depth, depth, cond_depth, **reach)]
        if config.position:
            layers.append(PixelPosition(depth, shape.grid))
        for number in range(1, config.num_layers + 1):
            layers.append(PixelConvB(depth, depth, cond_depth, **options))
            if config.attention_every and number % config.attention_every == 0:
                layers.append(PixelAttention(depth, config.num_heads, norm=config.norm))
        self.embedding = nn.Embedding(shape.codebook_size, depth)
        self.pixel_cnn = PixelCNN(*layers)
        self.head = nn.Sequential(
            ChannelNorm(2 * depth) if config.norm else nn.Identity(),
            Pointwise(2 * depth, depth),
            *(ResidualBlock(depth, 1, config.norm, config.dropout) for _ in range(config.num_output_blocks)),
            nn.ReLU(),
            Pointwise(depth, shape.codebook_size),
        )

    def forward(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Logits float [N, K, h, w] of codes int64 [N, h, w], each given those before it and the condition."""
        vert, horiz = self.pixel_cnn(self.embedding(codes).permute(0, 3, 1, 2), conds=condition)
        return self.head(torch.cat([vert, horiz], dim=1))

    def session(self, batch_size: int, condition: Tensor | None) -> GatedSession:
        """Computes the same logits place by place, each intermediate result once."""
        return GatedSession(self.embedding, self.pixel_cnn.layers, self.head, self.grid, batch_size, condition)
