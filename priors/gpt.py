"""A small decoder-only transformer over one level's codes, with the interface of the gated PixelCNN: the bridge to LLM training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.attention import CausalAttention, Memory
from priors.config import LevelShape
from priors.network_config import GPTConfig


class Block(nn.Module):
    """Attention and a perceptron, each on normalised features and added to them (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        depth = config.depth
        self.norm1, self.norm2 = nn.LayerNorm(depth), nn.LayerNorm(depth)
        self.attention = CausalAttention(depth, config.num_heads)
        self.expand, self.contract = nn.Linear(depth, 4 * depth), nn.Linear(4 * depth, depth)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, sequence: Tensor) -> Tensor:
        """Float [N, T, depth] -> the same shape; causal."""
        return self._perceptron(sequence + self.dropout(self.attention(self.norm1(sequence))))

    def step(self, place: Tensor, memory: Memory) -> Tensor:
        """What `forward` would give at the next place: float [N, depth] -> [N, depth]."""
        return self._perceptron(place + self.attention.step(self.norm1(place), memory))

    def _perceptron(self, features: Tensor) -> Tensor:
        return features + self.dropout(self.contract(F.gelu(self.expand(self.norm2(features)))))


class GPTNetwork(nn.Module):
    """Codes in raster order, each predicted from those before it, its place and the condition there.

    Args:
        config: sizes.
        shape: the grid of codes.
    """

    def __init__(self, config: GPTConfig, shape: LevelShape) -> None:
        super().__init__()
        depth, self.grid = config.depth, shape.grid
        self.embedding = nn.Embedding(shape.codebook_size, depth)
        self.start = nn.Parameter(torch.randn(depth) * 0.02)
        self.position = nn.Parameter(torch.randn(shape.num_codes, depth) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(depth)
        self.head = nn.Linear(depth, shape.codebook_size)
        for name, layer in self.named_modules():  # as in GPT-2
            if isinstance(layer, nn.Linear | nn.Embedding):
                onto_residual = name.endswith((".mix", ".contract"))
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.num_layers if onto_residual else 1))
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Logits float [N, K, h, w] of codes int64 [N, h, w], each given those before it and the condition."""
        embedded = self.embedding(codes.flatten(1)[:, :-1])
        sequence = torch.cat([self.start.expand(len(codes), 1, -1), embedded], dim=1) + self.position
        if condition is not None:
            sequence = sequence + _by_place(condition)
        for block in self.blocks:
            sequence = block(sequence)
        return self.head(self.norm(sequence)).transpose(1, 2).unflatten(2, self.grid)

    def session(self, batch_size: int, condition: Tensor | None) -> GPTSession:
        """Computes the same logits place by place, with the keys and values of all places before."""
        return GPTSession(self, batch_size, condition)


class GPTSession:
    """The places of N grids in raster order; see `priors.running.Session`."""

    def __init__(self, network: GPTNetwork, batch_size: int, condition: Tensor | None) -> None:
        self._network, self._place = network, 0
        self._start = network.start.expand(batch_size, -1)
        self._known = None if condition is None else _by_place(condition).expand(-1, len(network.position), -1)
        self._blocks = [
            (block, Memory(block.attention, batch_size, len(network.position)))
            for block in network.blocks
            if isinstance(block, Block)
        ]

    def step(self, previous: Tensor | None) -> Tensor:
        """Logits float [N, K] of the next place, given the codes int64 [N] of the one before (None at the first)."""
        network = self._network
        features = self._start if previous is None else network.embedding(previous)
        features = features + network.position[self._place]
        if self._known is not None:
            features = features + self._known[:, self._place]
        for block, memory in self._blocks:
            features = block.step(features, memory)
        self._place += 1
        return network.head(network.norm(features))


def _by_place(condition: Tensor) -> Tensor:
    """A condition float [N, depth] or [N, depth, h, w] as [N, 1 or T, depth]."""
    return condition[:, None] if condition.ndim == 2 else condition.flatten(2).transpose(1, 2)
