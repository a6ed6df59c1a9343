"""The VQ-VAE of strided convolutions, and with more levels the VQ-VAE-2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tokenizer.blocks import residual_stack
from tokenizer.config import TokenizerConfig
from tokenizer.net import Coded, Net, Quantize

Residuals = Callable[[], nn.Sequential]  # makes a new residual stack


class StridedNet(Net):
    """Grids of codes at a quarter of the image's side, an eighth, ... (van den Oord et al. 2017; Razavi et al. 2019, figure 2a).

    The coarsest level is quantized first. Every finer one is conditioned on those above: their decoded features join its encoder's before
    it is quantized, so that it need only hold what they do not. The pixel decoder sees all levels, brought to the finest grid. With two
    levels the layers are those of rosinality's vq-vae-2-pytorch, with one those of zalandoresearch's pytorch-vq-vae.

    Where we differ: in training, during the first half of the warm-up before a k-means start, the pixel decoder sees zeros for all but the
    coarsest level. Otherwise the finer grids, still unquantized, learn to carry everything, and the codes above end up almost ignored.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        hidden_dim, code_dim, number = config.hidden_dim, config.code_dim, config.num_levels
        residuals = partial(
            residual_stack, hidden_dim, config.residual_dim, config.num_residual_blocks,
            bias=config.residual_bias, rectified_skip=config.rectified_skip,
        )  # fmt: skip
        stack = (hidden_dim, residuals)
        self.names = config.level_names
        self.encoders = nn.ModuleList(  # fine to coarse
            [_quarter_encoder(config.input_channels, *stack), *[_half_encoder(*stack) for _ in range(number - 1)]]
        )
        self.to_code = nn.ModuleList(  # from here on coarse to fine
            [nn.Conv2d(hidden_dim + (code_dim if level else 0), code_dim, 1) for level in range(number)]
        )
        self.conditions = nn.ModuleList(
            [_half_decoder(level * code_dim, code_dim, *stack) for level in range(1, number)]
        )
        self.upsamplers = nn.ModuleList(
            [
                nn.ConvTranspose2d(level * code_dim, level * code_dim, 4, stride=2, padding=1)
                for level in range(1, number)
            ]
        )
        self.decoder = _quarter_decoder(number * code_dim, config.output_channels, *stack)

    def forward(self, images: Tensor) -> Coded:
        """See `Net`."""
        levels = {}

        def quantized(name: str, features: Tensor) -> Tensor:
            levels[name] = self.quantizers[name](features)
            return levels[name].vectors

        vectors = self._quantize(images, quantized)
        if self.training and len(vectors) > 1:
            heard = self.quantizers[self.names[0]].half_way.to(images.device)
            vectors[1:] = [torch.where(heard, finer, torch.zeros_like(finer)) for finer in vectors[1:]]
        return Coded(self._pixels(vectors), levels)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """See `Net`."""
        codes = {}

        def quantized(name: str, features: Tensor) -> Tensor:
            codes[name] = self.quantizers[name].encode(features)
            return self.quantizers[name].decode(codes[name])

        self._quantize(images, quantized)
        return codes

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """See `Net`."""
        return self._pixels([self.quantizers[name].decode(codes[name]) for name in self.names])

    def _quantize(self, images: Tensor, quantized: Quantize) -> list[Tensor]:
        """Encodes from fine to coarse, quantizes from coarse to fine; gives each level's vectors, coarse to fine."""
        features = []
        for encoder in self.encoders:
            images = encoder(images)
            features.append(images)
        vectors: list[Tensor] = []
        above: Tensor | None = None
        for level, name in enumerate(self.names):
            found = features[-1 - level]
            if level:
                above = self._joined(
                    level - 1, above, vectors[-1]
                )  # all levels so far, on the grid of the last of them
                found = torch.cat([self.conditions[level - 1](above), found], dim=1)
            vectors.append(quantized(name, self.to_code[level](found)))
        return vectors

    def _pixels(self, vectors: list[Tensor]) -> Tensor:
        joined = None
        for level, finer in enumerate(vectors):
            joined = self._joined(level, joined, finer)
        return self.decoder(joined)

    def _joined(self, level: int, above: Tensor | None, finer: Tensor) -> Tensor:
        """The vectors of a level, and before them those of all levels above, brought to its grid."""
        return finer if above is None else torch.cat([self.upsamplers[level - 1](above), finer], dim=1)


def _quarter_encoder(channels: int, hidden_dim: int, residuals: Residuals) -> nn.Sequential:
    """Halves the image twice: [N, channels, H, W] -> [N, hidden_dim, H/4, W/4] (van den Oord et al. 2017, section 4.1)."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden_dim // 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden_dim // 2, hidden_dim, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
        residuals(),
    )


def _half_encoder(hidden_dim: int, residuals: Residuals) -> nn.Sequential:
    """Halves a feature map once: [N, hidden_dim, h, w] -> [N, hidden_dim, h/2, w/2] (rosinality, encoder of stride 2)."""
    return nn.Sequential(
        nn.Conv2d(hidden_dim, hidden_dim // 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden_dim // 2, hidden_dim, 3, padding=1),
        residuals(),
    )


def _quarter_decoder(depth: int, channels: int, hidden_dim: int, residuals: Residuals) -> nn.Sequential:
    """Doubles the grid twice: [N, depth, h, w] -> [N, channels, 4h, 4w]."""
    return nn.Sequential(
        nn.Conv2d(depth, hidden_dim, 3, padding=1),
        residuals(),
        nn.ConvTranspose2d(hidden_dim, hidden_dim // 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(hidden_dim // 2, channels, 4, stride=2, padding=1),
    )


def _half_decoder(depth: int, code_dim: int, hidden_dim: int, residuals: Residuals) -> nn.Sequential:
    """Doubles the grid once: [N, depth, h, w] -> [N, code_dim, 2h, 2w] (rosinality, decoder of stride 2)."""
    return nn.Sequential(
        nn.Conv2d(depth, hidden_dim, 3, padding=1),
        residuals(),
        nn.ConvTranspose2d(hidden_dim, code_dim, 4, stride=2, padding=1),
    )
