"""DALL-E's residual groups with pooling between them; also the video VQ-VAE that stacks frames as channels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.net import Coded, Net


class GroupBlock(nn.Module):
    """x + gain * four convolutions through a quarter of the channels (openai/DALL-E's EncoderBlock and DecoderBlock).

    Args:
        depth_in: channels of x; the identity path has a 1x1 convolution when they change.
        depth_out: channels of the result.
        kernels: of the four convolutions: (3, 3, 3, 1) in encoders, (1, 3, 3, 3) in decoders.
        gain: 1 / (groups x blocks)^2 there, so that a deep network begins near the identity.
    """

    def __init__(self, depth_in: int, depth_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        quarter = depth_out // 4
        depths = (depth_in, quarter, quarter, quarter, depth_out)
        self.gain = gain
        self.identity = nn.Conv2d(depth_in, depth_out, 1) if depth_in != depth_out else nn.Identity()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(before, after, kernel, padding=kernel // 2)
                for (before, after), kernel in zip(pairwise(depths), kernels, strict=True)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, depth_in, h, w] -> [N, depth_out, h, w]."""
        found = x
        for conv in self.convs:
            found = conv(F.relu(found))
        return self.identity(x) + self.gain * found


class GroupedNet(Net):
    """Groups of blocks of 1, 2, 3, ... times `hidden_dim` channels, the side halved between them; the decoder is the mirror.

    The layers are those of zhangxuan1918/VqVaeVideo's `vq_vae1_video`: two 7x7 convolutions at the pixels (DALL-E has one) and widths that
    grow linearly (DALL-E's double).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        width, blocks = config.hidden_dim, config.num_residual_blocks
        widths = [width * group for group in range(1, config.num_groups + 1)]
        gain = 1 / (config.num_groups * blocks) ** 2
        (self.name,) = config.level_names
        self.encoder = nn.Sequential(
            nn.Conv2d(config.input_channels, 4 * width, 7, padding=3),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 7, padding=3),
            *_groups([width, *widths], (3, 3, 3, 1), gain, blocks, nn.MaxPool2d(2)),
            nn.ReLU(),
            nn.Conv2d(widths[-1], config.code_dim, 1),
        )
        self.decoder = nn.Sequential(
            *_groups([config.code_dim, *reversed(widths)], (1, 3, 3, 3), gain, blocks, nn.Upsample(scale_factor=2)),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 7, padding=3),
            nn.ReLU(),
            nn.Conv2d(4 * width, config.output_channels, 7, padding=3),
        )

    def forward(self, images: Tensor) -> Coded:
        """See `Net`."""
        level = self.quantizers[self.name](self.encoder(images))
        return Coded(self.decoder(level.vectors), {self.name: level})

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """See `Net`."""
        return {self.name: self.quantizers[self.name].encode(self.encoder(images))}

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """See `Net`."""
        return self.decoder(self.quantizers[self.name].decode(codes[self.name]))


def _groups(
    depths: list[int], kernels: tuple[int, int, int, int], gain: float, num_blocks: int, between: nn.Module
) -> list[nn.Module]:
    """A group of blocks for each pair of neighbouring depths, and between groups a change of the side."""
    layers: list[nn.Module] = []
    for before, after in pairwise(depths):
        layers += [GroupBlock(after if block else before, after, kernels, gain) for block in range(num_blocks)]
        layers.append(between)
    return layers[:-1]
