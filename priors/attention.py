"""Causal self-attention over the places of a grid in raster order, for whole grids and one place at a time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from priors.blocks import ChannelNorm


class CausalAttention(nn.Module):
    """Multi-head attention in which each place sees itself and those before it (Vaswani et al. 2017).

    Args:
        depth: channels; a multiple of num_heads.
        num_heads: heads, each of depth / num_heads channels.
    """

    def __init__(self, depth: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(depth, 3 * depth)
        self.mix = nn.Linear(depth, depth)

    def forward(self, sequence: Tensor) -> Tensor:
        """Float [N, T, depth] -> the same shape."""
        query, key, value = self._heads(sequence)
        return self._mixed(F.scaled_dot_product_attention(query, key, value, is_causal=True))

    def step(self, place: Tensor, memory: Memory) -> Tensor:
        """What `forward` would give at the next place: float [N, depth] -> [N, depth]; the memory grows by that place."""
        query, key, value = self._heads(place[:, None])
        keys, values = memory.add(key, value)
        return self._mixed(F.scaled_dot_product_attention(query, keys, values))[:, 0]

    def _heads(self, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project(sequence).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def _mixed(self, heads: Tensor) -> Tensor:
        return self.mix(heads.transpose(1, 2).flatten(2))


class Memory:
    """The keys and values of the places so far, for N grids of T places.

    Args:
        attention: whose.
        batch_size: N.
        num_places: T.
    """

    def __init__(self, attention: CausalAttention, batch_size: int, num_places: int) -> None:
        weight = attention.mix.weight
        shape = (batch_size, attention.num_heads, num_places, len(weight) // attention.num_heads)
        self._keys, self._values, self._filled = weight.new_empty(shape), weight.new_empty(shape), 0

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes up one more place, [N, heads, 1, d] each, and gives all of them, [N, heads, t, d] each."""
        self._keys[:, :, self._filled : self._filled + 1] = key
        self._values[:, :, self._filled : self._filled + 1] = value
        self._filled += 1
        return self._keys[:, :, : self._filled], self._values[:, :, : self._filled]


class PixelAttention(nn.Module):
    """Attention among all places that a PixelCNN may see, added to its horizontal stack (Razavi et al. 2019, section 3.2).

    The horizontal stack at a place knows nothing of the code there, so the place may attend to itself. The vertical stack passes by.
    unixpickle/vq-vae-2 attends within each stack and masks the past, not the future; neither is inherited.

    Args:
        depth: channels of each stack.
        num_heads: heads of the attention.
        norm: ChannelNorm on what comes in.
    """

    def __init__(self, depth: int, num_heads: int, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = ChannelNorm(depth) if norm else nn.Identity()
        self.attention = CausalAttention(depth, num_heads)

    def forward(self, vert_in: Tensor, horiz_in: Tensor, conds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks, float [N, depth, h, w] each. The condition passes by."""
        found = self.attention(self.norm(horiz_in).flatten(2).transpose(1, 2))
        return vert_in, horiz_in + found.transpose(1, 2).unflatten(2, horiz_in.shape[2:])

    def step(self, horiz_in: Tensor, memory: Memory) -> Tensor:
        """The horizontal stack at the next place, float [N, depth]."""
        return horiz_in + self.attention.step(self.norm(horiz_in), memory)
