"""The hierarchy of unixpickle/vq-vae-2: every level reconstructs the features below it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.blocks import ResidualBlock
from tokenizer.config import TokenizerConfig
from tokenizer.net import Coded, Net


class QuarterEncoder(nn.Module):
    """Halves the image twice, padding more at the right and at the bottom: [N, C, H, W] -> [N, width, H/4, W/4]."""

    def __init__(self, channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 4, stride=2)
        self.conv2 = nn.Conv2d(width, width, 4, stride=2)
        self.residuals = _residuals(width, num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = F.relu(self.conv1(F.pad(x, (1, 2, 1, 2))))
        return self.residuals(self.conv2(F.pad(x, (1, 2, 1, 2))))


class HalfEncoder(nn.Module):
    """Halves a feature map once: [N, width, h, w] -> [N, width, h/2, w/2]."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.residuals = _residuals(width, num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.residuals(self.conv(x))


class HalfDecoder(nn.Module):
    """Doubles the grid once: [N, width, h, w] -> [N, width, 2h, 2w]."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.residuals = _residuals(width, num_blocks)
        self.conv = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv(F.relu(self.residuals(x)))


class QuarterDecoder(nn.Module):
    """Doubles the grid twice: [N, width, h, w] -> [N, channels, 4h, 4w]."""

    def __init__(self, width: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.residuals = _residuals(width, num_blocks)
        self.conv1 = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv2 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv2(F.relu(self.conv1(F.relu(self.residuals(x)))))


class Mixer(nn.Module):
    """Brings what is known so far to the next finer grid, and mixes that level's vectors in."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.up = HalfDecoder(width, num_blocks)
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, known: Tensor, finer: Tensor) -> Tensor:
        """Float [N, width, h, w] and [N, width, 2h, 2w] -> [N, width, 2h, 2w]."""
        return self.mix(torch.cat([F.relu(self.up(known)), finer], dim=1))


class StackDecoder(nn.Module):
    """A decoder of several levels. With two of them and a QuarterDecoder it is the source's HalfQuarterDecoder."""

    def __init__(self, num_levels: int, width: int, num_blocks: int, last: nn.Module) -> None:
        super().__init__()
        self.mixers = nn.ModuleList([Mixer(width, num_blocks) for _ in range(num_levels - 1)])
        self.last = last

    def forward(self, vectors: list[Tensor]) -> Tensor:
        """Vectors of the levels, coarse to fine, each [N, width, h, w] -> what `last` makes of them."""
        known = vectors[0]
        for mixer, finer in zip(self.mixers, vectors[1:], strict=True):
            known = mixer(known, finer)
        return self.last(known)


class UnixpickleNet(Net):
    """Encoders that each go on from the features below, unquantized, and as many decoders.

    Decoder i sees the vectors of levels 0..i, coarse to fine. All but the last learn to give the features that level i + 1 quantizes
    (`conditioning` by features; the paper conditions the finer level on the coarser one's decoded vectors instead, see StridedNet); the
    last gives pixels. Their errors are added to the loss.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        width, blocks, number = config.hidden_dim, config.num_residual_blocks, config.num_levels
        self.names = config.level_names
        self.encoders = nn.ModuleList(  # fine to coarse
            [
                QuarterEncoder(config.input_channels, width, blocks),
                *[HalfEncoder(width, blocks) for _ in range(number - 1)],
            ]
        )
        features = [StackDecoder(level, width, blocks, HalfDecoder(width, blocks)) for level in range(1, number)]
        pixels = StackDecoder(number, width, blocks, QuarterDecoder(width, config.output_channels, blocks))
        self.decoders = nn.ModuleList([*features, pixels])  # coarse to fine

    def forward(self, images: Tensor) -> Coded:
        """See `Net`."""
        features = self._features(images)
        levels = {name: self.quantizers[name](found) for name, found in zip(self.names, features, strict=True)}
        vectors = [level.vectors for level in levels.values()]
        errors = [
            F.mse_loss(decoder(vectors[: level + 1]).float(), features[level + 1].detach().float())
            for level, decoder in enumerate(self.decoders[:-1])
        ]
        return Coded(self.decoders[-1](vectors), levels, torch.stack(errors).sum() if errors else None)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """See `Net`."""
        features = self._features(images)
        return {name: self.quantizers[name].encode(found) for name, found in zip(self.names, features, strict=True)}

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """See `Net`; finer levels may be missing: their features are then predicted from those above, and quantized.

        The source's `full_reconstructions` predicts every level from the true codes above it, also those that it leaves out; here a
        prediction follows from the codes that are given, and from nothing else.
        """
        vectors: list[Tensor] = []
        for level, name in enumerate(self.names):
            given = codes.get(name)
            if given is None:
                given = self.quantizers[name].encode(self.decoders[level - 1](vectors))
            vectors.append(self.quantizers[name].decode(given))
        return self.decoders[-1](vectors)

    def _features(self, images: Tensor) -> list[Tensor]:
        """What each level quantizes, coarse to fine."""
        features: list[Tensor] = []
        for encoder in self.encoders:
            images = encoder(images)
            features.insert(0, images)
        return features


def _residuals(width: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*[ResidualBlock(width, width) for _ in range(num_blocks)])
