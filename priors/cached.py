"""A gated PixelCNN one place at a time: the vertical stack once a row, the horizontal stack once a place, nothing twice.

For a grid of h x w codes a forward pass for every place computes each layer h * w times at h * w places. Here each layer is computed
once at each place, as in one forward pass (Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models",
keep convolutions' inputs likewise).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.attention import Memory, PixelAttention
from priors.pixelcnn import PixelConvA, PixelConvB, PixelPosition, gated_activation


class GatedSession:
    """The places of N grids in raster order; see `priors.running.Session`.

    Args:
        embedding: of codes.
        layers: of a PixelCNN: PixelConvA first, then PixelConvB, PixelPosition and PixelAttention.
        head: both stacks at a place, float [N, 2 * depth] -> logits.
        grid: (h, w).
        batch_size: N.
        condition: float [N, depth] or [N, depth, h, w], or None.
    """

    def __init__(
        self, embedding: nn.Embedding, layers: Iterable[nn.Module], head: nn.Module, grid: tuple[int, int], batch_size: int,
        condition: Tensor | None,
    ) -> None:  # fmt: skip
        first, *later = layers
        assert isinstance(first, PixelConvA)
        self._embedding, self._head, self._width, self._place = embedding, head, grid[1], 0
        self._first = _ConvCache(first, batch_size, grid[1], condition)
        self._later = [_cache(layer, batch_size, grid, condition) for layer in later]
        self._row_above = embedding.weight.new_zeros(batch_size, grid[1], embedding.embedding_dim)
        self._vertical: Tensor  # of this row, [w, N, depth]; made when it begins

    def step(self, previous: Tensor | None) -> Tensor:
        """Logits float [N, K] of the next place, given the codes int64 [N] of the one before (None at the first)."""
        row, column = divmod(self._place, self._width)
        if previous is not None:
            embedded = self._embedding(previous)
            self._row_above[:, column - 1] = embedded  # at column 0: the last of the row that is finished
            if column:
                self._first.remember(column - 1, embedded)
        if column == 0:
            self._begin_row(row)
        horiz = self._first.place(column)
        for layer in self._later:
            horiz = layer.place(column, horiz)
        self._place += 1
        return self._head(torch.cat([self._vertical[column], horiz], dim=1))

    def _begin_row(self, row: int) -> None:
        vert = _by_column(self._first.row(row, self._row_above))
        for layer in self._later:
            vert = layer.row(row, vert)
        self._vertical = vert.transpose(0, 1).contiguous()


class _Cache(Protocol):
    def row(self, row: int, vert: Tensor) -> Tensor:
        """The vertical stack of a row, float [N, w, depth], one layer on."""
        ...

    def place(self, column: int, horiz: Tensor) -> Tensor:
        """The horizontal stack at a place of that row, float [N, depth], one layer on."""
        ...


class _ConvCache:
    """PixelConvA, and what PixelConvB shares with it: rows above, places to the left, and the vertical stack's part of the row."""

    def __init__(self, layer: PixelConvA | PixelConvB, batch_size: int, width: int, condition: Tensor | None) -> None:
        self._layer, self._condition, self._sides = layer, condition, layer.horizontal
        rows, (_, taps) = layer.vertical_conv.kernel_size[0], layer.horizontal_conv.kernel_size
        weight = layer.horizontal_conv.weight  # [2 * depth_out, depth_in, 1, taps]
        self._taps = taps
        self._weight = weight[:, :, 0].permute(2, 1, 0).reshape(taps * layer.depth_in, 2 * layer.depth_out).contiguous()
        self._above = weight.new_zeros(batch_size, rows, width, layer.depth_in)
        self._left = weight.new_zeros(batch_size, width + self._sides, layer.depth_in)
        self._from_above: Tensor  # float [w, N, 2 * depth_out]; made when the row begins

    def row(self, row: int, vert: Tensor) -> Tensor:
        """The gated vertical stack of a row, float [N, depth_out, 1, w], of the newest row that it sees, float [N, w, depth_in]."""
        layer, conv = self._layer, self._layer.vertical_conv
        self._above = torch.cat([self._above[:, 1:], vert[:, None]], dim=1)
        # Channels last in memory, as all here: oneDNN is quickest so.
        found = F.conv2d(self._above.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=(0, self._sides))
        beside = layer.vert_to_horiz(found) + layer.horizontal_conv.bias[:, None, None]  # pyright: ignore[reportOptionalSubscript]
        if self._condition is not None and layer.cond_layer is not None:
            known = self._condition
            known = known[:, :, None, None] if known.ndim == 2 else known[:, :, row : row + 1]
            for_vert, for_horiz = layer.cond_layer(known).chunk(2, dim=1)
            found, beside = found + for_vert, beside + for_horiz
        self._from_above = beside[:, :, 0].permute(2, 0, 1).contiguous()
        return gated_activation(found)

    def remember(self, column: int, horiz: Tensor) -> None:
        """Takes up what the horizontal stack sees at a place, float [N, depth_in]."""
        self._left[:, column + self._sides] = horiz

    def place(self, column: int) -> Tensor:
        """The gated horizontal stack at a place, float [N, depth_out]."""
        seen = self._left[:, column : column + self._taps].flatten(1)
        return gated_activation(torch.addmm(self._from_above[column], seen, self._weight))


class _LaterConvCache:
    """PixelConvB."""

    def __init__(self, layer: PixelConvB, batch_size: int, width: int, condition: Tensor | None) -> None:
        self._layer, self._conv = layer, _ConvCache(layer, batch_size, width, condition)

    def row(self, row: int, vert: Tensor) -> Tensor:
        """See `_Cache`."""
        layer, maps = self._layer, vert.transpose(1, 2)[:, :, None]
        found = self._conv.row(row, _by_column(layer.vert_norm(maps)))
        if layer.vert_residual is not None:
            found = layer.vert_skip(maps) + layer.vert_residual(found)
        return _by_column(found)

    def place(self, column: int, horiz: Tensor) -> Tensor:
        """See `_Cache`."""
        self._conv.remember(column, self._layer.horiz_norm(horiz))
        return self._layer.horiz_skip(horiz) + self._layer.horiz_residual(self._conv.place(column))


class _PositionCache:
    """PixelPosition."""

    def __init__(self, layer: PixelPosition) -> None:
        self._vectors = layer.vectors.detach().permute(0, 2, 3, 1).contiguous()  # [2, h, w, depth]
        self._row = 0

    def row(self, row: int, vert: Tensor) -> Tensor:
        """See `_Cache`."""
        self._row = row
        return vert + self._vectors[0, row]

    def place(self, column: int, horiz: Tensor) -> Tensor:
        """See `_Cache`."""
        return horiz + self._vectors[1, self._row, column]


class _AttentionCache:
    """PixelAttention."""

    def __init__(self, layer: PixelAttention, batch_size: int, num_places: int) -> None:
        self._layer, self._memory = layer, Memory(layer.attention, batch_size, num_places)

    def row(self, row: int, vert: Tensor) -> Tensor:
        """See `_Cache`."""
        return vert

    def place(self, column: int, horiz: Tensor) -> Tensor:
        """See `_Cache`."""
        return self._layer.step(horiz, self._memory)


def _cache(layer: nn.Module, batch_size: int, grid: tuple[int, int], condition: Tensor | None) -> _Cache:
    if isinstance(layer, PixelConvB):
        return _LaterConvCache(layer, batch_size, grid[1], condition)
    if isinstance(layer, PixelPosition):
        return _PositionCache(layer)
    if isinstance(layer, PixelAttention):
        return _AttentionCache(layer, batch_size, grid[0] * grid[1])
    raise TypeError(f"no cached form of {type(layer).__name__} is known")


def _by_column(maps: Tensor) -> Tensor:
    """Features of one row, float [N, depth, 1, w], as [N, w, depth]."""
    return maps[:, :, 0].transpose(1, 2)
