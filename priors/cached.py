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
from priors.pixelcnn import PixelConvA, PixelConvB, PixelPosition


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

    @torch.no_grad()
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

    @torch.no_grad()
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
        horiz = -self._first.place(column)
        for layer in self._later:
            horiz = layer.place(column, horiz)
        self._place += 1
        return self._head(torch.cat([self._vertical[column], horiz], dim=1))

    def _begin_row(self, row: int) -> None:
        vert = self._first.row(row, self._row_above)
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
    """PixelConvA, and what PixelConvB shares with it: rows above, places to the left, and the vertical stack's part of the row.

    A place costs few microseconds a layer, so each operation counts: windows are views made once, results go where they are read. The gates
    are tanh(x) * sigmoid(y) as (2 * sigmoid(2x) - 1) * sigmoid(y), one call for both halves (and PyTorch's tanh on CPU is several times
    slower than its sigmoid). All weights that lead to x are doubled for it beforehand, which rounds nothing.
    """

    def __init__(self, layer: PixelConvA | PixelConvB, batch_size: int, width: int, condition: Tensor | None) -> None:
        vertical, horizontal, across = layer.vertical_conv, layer.horizontal_conv, layer.vert_to_horiz
        rows, taps, self._sides = vertical.kernel_size[0], horizontal.kernel_size[1], layer.horizontal
        depth_in, depth = layer.depth_in, layer.depth_out
        weight = horizontal.weight  # [2 * depth, depth_in, 1, taps]
        twice = weight.new_tensor([2, 1]).repeat_interleave(depth)
        # Channels last in memory, as all here: oneDNN is quickest so.
        self._kernel = (vertical.weight * twice[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        self._kernel_bias = _bias(vertical) * twice
        self._across = across.weight[:, :, 0, 0] * twice[:, None] / twice
        self._across_bias = (_bias(across) + _bias(horizontal)) * twice
        self._weight = (
            weight[:, :, 0].permute(2, 1, 0).flatten(0, 1) * twice
        ).contiguous()  # [taps * depth_in, 2 * depth]
        self._known: tuple[Tensor, Tensor] | None = None
        if condition is not None and layer.cond_layer is not None:
            maps = condition[:, :, None, None] if condition.ndim == 2 else condition
            self._condition = maps.permute(2, 0, 3, 1)  # [h or 1, N, w or 1, depth]
            link, both = layer.cond_layer, twice.repeat(2)
            self._known = link.weight[:, :, 0, 0] * both[:, None], _bias(link) * both
        self._above = weight.new_zeros(batch_size, rows, width, depth_in)
        left = weight.new_zeros(batch_size, self._sides + width, depth_in)
        self._slots = left[:, self._sides :].unbind(1)
        self._windows = [left.flatten(1)[:, first * depth_in : (first + taps) * depth_in] for first in range(width)]
        self._from_above: tuple[Tensor, ...]  # for each column, float [N, 2 * depth]; made when the row begins
        self._gates = weight.new_empty(batch_size, 2 * depth)
        self._signal, self._gate = self._gates.chunk(2, dim=1)
        self._gated = weight.new_empty(batch_size, depth)

    def row(self, row: int, vert: Tensor) -> Tensor:
        """The gated vertical stack of a row, float [N, w, depth], of the newest row that it sees, float [N, w, depth_in]."""
        self._above = torch.cat([self._above[:, 1:], vert[:, None]], dim=1)
        maps = F.conv2d(self._above.permute(0, 3, 1, 2), self._kernel, self._kernel_bias, padding=(0, self._sides))
        found = maps[:, :, 0].transpose(1, 2)  # [N, w, 2 * depth]
        beside = F.linear(found, self._across, self._across_bias)
        if self._known is not None:
            known = F.linear(self._condition[row % len(self._condition)], *self._known)
            for_vert, for_horiz = known.chunk(2, dim=2)
            found, beside = found + for_vert, beside + for_horiz
        self._from_above = beside.transpose(0, 1).contiguous().unbind()
        signal, gate = found.sigmoid().chunk(2, dim=2)
        return torch.addcmul(gate, signal, gate, value=-2).neg()

    def remember(self, column: int, horiz: Tensor) -> None:
        """Takes up what the horizontal stack sees at a place, float [N, depth_in]."""
        self._slots[column].copy_(horiz)

    def place(self, column: int) -> Tensor:
        """The gated horizontal stack at a place with its sign turned, float [N, depth]; valid until the next call."""
        torch.addmm(self._from_above[column], self._windows[column], self._weight, out=self._gates).sigmoid_()
        return torch.addcmul(self._gate, self._signal, self._gate, value=-2, out=self._gated)


class _LaterConvCache:
    """PixelConvB."""

    def __init__(self, layer: PixelConvB, batch_size: int, width: int, condition: Tensor | None) -> None:
        self._layer, self._conv = layer, _ConvCache(layer, batch_size, width, condition)
        self._residual, self._bias = layer.horiz_residual.weight[:, :, 0, 0].T.contiguous(), _bias(layer.horiz_residual)

    def row(self, row: int, vert: Tensor) -> Tensor:
        """See `_Cache`."""
        layer, places = self._layer, vert.flatten(0, 1)
        found = self._conv.row(row, layer.vert_norm(places).view_as(vert))
        if layer.vert_residual is None:
            return found
        return (layer.vert_skip(places) + layer.vert_residual(found.flatten(0, 1))).unflatten(0, vert.shape[:2])

    def place(self, column: int, horiz: Tensor) -> Tensor:
        """See `_Cache`."""
        self._conv.remember(column, self._layer.horiz_norm.forward(horiz))
        turned = self._conv.place(column)
        return torch.addmm(self._layer.horiz_skip(horiz), turned, self._residual, alpha=-1).add_(self._bias)


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


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
