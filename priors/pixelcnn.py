"""Gated PixelCNN layers: a vertical stack that sees the rows above, and a horizontal one that also sees what is to the left.

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders" (arXiv 1606.05328), in the arrangement of
unixpickle/vq-vae-2, whose names and arguments are kept: nothing is masked, images are padded and shifted instead.

Seen from a position (r, c), in one layer:

    PixelConvA, vertical:    rows r - vertical .. r - 1, columns c - horizontal .. c + horizontal of the image
    PixelConvA, horizontal:  row r, columns c - horizontal .. c - 1 of the image, and this layer's vertical stack at (r, c)
    PixelConvB, vertical:    rows r - vertical .. r, columns c - horizontal .. c + horizontal of the vertical stack
    PixelConvB, horizontal:  row r, columns c - horizontal .. c of the horizontal stack, and this layer's vertical stack at (r, c)

After PixelConvA neither stack at (r, c) knows the image at (r, c), so the layers after it may look at their own position.
L layers in all see L * vertical rows up and L * horizontal columns to each side, without a blind spot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.blocks import ChannelNorm, Pointwise


def gated_activation(features: Tensor) -> Tensor:
    """Lets the first half of the channels (tanh) through the second (sigmoid): float [N, 2C, ...] -> [N, C, ...]."""
    signal, gate = features.chunk(2, dim=1)
    return torch.tanh(signal) * torch.sigmoid(gate)


class PixelConv(nn.Module):
    """What PixelConvA and PixelConvB share: two directional convolutions, their link, the condition and the gates.

    Args:
        depth_in: channels that come in.
        depth_out: channels that go out, in each stack.
        cond_depth: channels of the condition; None for a layer that takes none.
        horizontal: reach to the left, and to both sides in rows above, in positions.
        vertical: reach upward, in positions.
        sees_itself: whether a position's own input is seen (PixelConvB) or not (PixelConvA).
    """

    def __init__(
        self, depth_in: int, depth_out: int, cond_depth: int | None, horizontal: int, vertical: int, sees_itself: bool
    ) -> None:
        super().__init__()
        self.depth_in = depth_in
        self.depth_out = depth_out
        self.horizontal = horizontal
        self.vertical = vertical
        self.shift = 0 if sees_itself else 1
        own = 1 - self.shift
        self.vertical_conv = nn.Conv2d(depth_in, 2 * depth_out, (vertical + own, 2 * horizontal + 1))
        self.horizontal_conv = nn.Conv2d(depth_in, 2 * depth_out, (1, horizontal + own))
        self.vert_to_horiz = Pointwise(2 * depth_out, 2 * depth_out)
        self.cond_layer = None if cond_depth is None else Pointwise(cond_depth, 4 * depth_out)

    def _run_stacks(self, vert_in: Tensor, horiz_in: Tensor, conds: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gated outputs of both stacks, each float [N, depth_out, H, W]."""
        height, width = vert_in.shape[2:]
        sides = self.horizontal
        # Padding one more than the kernel needs, at the bottom or right, would look ahead; the shift drops the last row or
        # column of the input instead, so that the output at r is made of rows before r.
        above = F.pad(vert_in[:, :, : height - self.shift], (sides, sides, self.vertical, 0))
        left = F.pad(horiz_in[:, :, :, : width - self.shift], (self.horizontal, 0, 0, 0))
        vert = self.vertical_conv(above)
        horiz = self.horizontal_conv(left) + self.vert_to_horiz(vert)
        if conds is not None:
            if self.cond_layer is None:
                raise ValueError("this layer was made with cond_depth=None, but was given a condition.")
            spatial = conds[:, :, None, None] if conds.ndim == 2 else conds
            vert_bias, horiz_bias = self.cond_layer(spatial).chunk(2, dim=1)
            vert, horiz = vert + vert_bias, horiz + horiz_bias
        return gated_activation(vert), gated_activation(horiz)


class PixelConvA(PixelConv):
    """The first layer of a PixelCNN: no position sees itself.

    The source drops `horizontal` and `vertical` of its first layer (both are always 2 there); here they hold.

    Args:
        depth_in: channels of the image.
        depth_out: channels of each stack.
        cond_depth: channels of the condition; None for a layer that takes none.
        horizontal: reach to the left, and to both sides in rows above, in positions.
        vertical: reach upward, in positions.
    """

    def __init__(
        self, depth_in: int, depth_out: int, cond_depth: int | None = None, horizontal: int = 2, vertical: int = 2
    ) -> None:
        super().__init__(depth_in, depth_out, cond_depth, horizontal, vertical, sees_itself=False)

    def forward(self, images: Tensor, conds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks of an image.

        Args:
            images: float [N, depth_in, H, W].
            conds: float [N, cond_depth], the same for all positions, or [N, cond_depth, H, W]; N may be 1 for all samples.

        Returns:
            (vertical, horizontal), each float [N, depth_out, H, W].
        """
        return self._run_stacks(images, images, conds)


class PixelConvB(PixelConv):
    """Any later layer of a PixelCNN: a position sees its own stacks, which do not know the image there.

    With the defaults it computes what the source's layer does. The last three arguments are improvements on it.

    Args:
        depth_in: channels of each stack that comes in.
        depth_out: channels of each stack that goes out; None for as many as come in (the source has only that).
        cond_depth: channels of the condition; None for a layer that takes none.
        horizontal: reach to the left, and to both sides in rows above, in positions.
        vertical: reach upward, in positions.
        norm: ChannelNorm on what comes in.
        vertical_residual: add what comes in to what goes out in the vertical stack too, not only in the horizontal one.
        dropout: probability at which gated activations are dropped in training.
    """

    def __init__(
        self,
        depth_in: int,
        depth_out: int | None = None,
        cond_depth: int | None = None,
        horizontal: int = 2,
        vertical: int = 2,
        *,
        norm: bool = False,
        vertical_residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        depth_out = depth_in if depth_out is None else depth_out
        super().__init__(depth_in, depth_out, cond_depth, horizontal, vertical, sees_itself=True)
        same = depth_in == depth_out
        self.vert_norm = ChannelNorm(depth_in) if norm else nn.Identity()
        self.horiz_norm = ChannelNorm(depth_in) if norm else nn.Identity()
        self.horiz_residual = Pointwise(depth_out, depth_out)
        self.horiz_skip = nn.Identity() if same else Pointwise(depth_in, depth_out)
        self.vert_residual = Pointwise(depth_out, depth_out) if vertical_residual else None
        self.vert_skip = Pointwise(depth_in, depth_out) if vertical_residual and not same else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, vert_in: Tensor, horiz_in: Tensor, conds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks, one layer on.

        Args:
            vert_in: float [N, depth_in, H, W], the vertical stack.
            horiz_in: float [N, depth_in, H, W], the horizontal stack.
            conds: float [N, cond_depth], the same for all positions, or [N, cond_depth, H, W]; N may be 1 for all samples.

        Returns:
            (vertical, horizontal), each float [N, depth_out, H, W].
        """
        vert, horiz = self._run_stacks(self.vert_norm(vert_in), self.horiz_norm(horiz_in), conds)
        vert, horiz = self.dropout(vert), self.dropout(horiz)
        if self.vert_residual is not None:
            vert = self.vert_skip(vert_in) + self.vert_residual(vert)
        return vert, self.horiz_skip(horiz_in) + self.horiz_residual(horiz)


class PixelPosition(nn.Module):
    """A learned vector for each place of the grid, added to both stacks; goes anywhere after the first layer.

    Args:
        depth: channels of each stack.
        grid: (h, w) of the only grid it fits.
    """

    def __init__(self, depth: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(2, depth, *grid) * 0.1)

    def forward(self, vert_in: Tensor, horiz_in: Tensor, conds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks, float [N, depth, h, w] each, with their place added. The condition passes by."""
        return vert_in + self.vectors[0], horiz_in + self.vectors[1]


class PixelCNN(nn.Module):
    """Layers in a row: one PixelConvA, then any that map (vertical, horizontal, conds) to (vertical, horizontal).

    Example:
        >>> net = PixelCNN(PixelConvA(16, 32), PixelConvB(32), PixelConvB(32, horizontal=3))
        >>> vertical, horizontal = net(torch.zeros(1, 16, 7, 7))
        >>> horizontal.shape
        torch.Size([1, 32, 7, 7])
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor, conds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks of an image float [N, C, H, W]; every layer is given the condition."""
        first, *later = self.layers
        vert, horiz = first(images, conds=conds)
        for layer in later:
            vert, horiz = layer(vert, horiz, conds=conds)
        return vert, horiz
