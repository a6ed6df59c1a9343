"""A prior over a hierarchy of code grids: p(top | label) p(bottom | top, label), one network a level.

Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.config import LevelShape, PriorConfig, preset_config
from priors.pixelcnn import ChannelNorm, PixelCNN, PixelConvA, PixelConvB, PixelPosition
from vqmill.checkpoint import fingerprint
from vqmill.errors import CodesError


class ResidualBlock(nn.Module):
    """A residual pair of convolutions, float [N, depth, h, w] -> the same shape. With kernel 1 it keeps positions apart."""

    def __init__(self, depth: int, kernel: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(depth) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(depth, depth, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(depth, depth, kernel, padding=kernel // 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """The features with the block's correction added."""
        hidden = self.conv1(F.relu(self.norm(features)))
        return features + self.conv2(self.dropout(F.relu(hidden)))


class UpperCondition(nn.Module):
    """Turns the codes of a coarser level into features on a finer level's grid: int64 [N, h, w] -> float [N, depth, H, W]."""

    def __init__(self, upper: LevelShape, level: LevelShape, config: PriorConfig) -> None:
        super().__init__()
        depth = config.depth
        ratio = (level.grid[0] // upper.grid[0], level.grid[1] // upper.grid[1])
        self.embedding = nn.Embedding(upper.codebook_size, depth)
        self.blocks = nn.Sequential(
            *(ResidualBlock(depth, 3, config.norm, config.dropout) for _ in range(config.num_condition_blocks))
        )
        # Kernel = stride: each of the finer codes under a coarse one gets weights of its own, and no edge is special.
        self.upsample = nn.ConvTranspose2d(depth, depth, ratio, stride=ratio)

    def forward(self, codes: Tensor) -> Tensor:
        """Features of every place of the finer grid."""
        return self.upsample(self.blocks(self.embedding(codes).permute(0, 3, 1, 2)))


class LevelPrior(nn.Module):
    """A gated PixelCNN over one grid of codes, given a label and the coarser levels.

    Args:
        config: the whole prior's configuration.
        index: which of its levels, 0 for the coarsest.
    """

    def __init__(self, config: PriorConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.shape = config.levels[index]
        self.num_classes = config.num_classes
        self.label_dropout = config.label_dropout
        depth = config.depth
        uppers = config.levels[:index]
        self.uppers = nn.ModuleList(UpperCondition(upper, self.shape, config) for upper in uppers)
        self.upper_names = tuple(upper.name for upper in uppers)
        # Row 0 stands for label -1, so that a label out of its range is an index error and not another label.
        self.label_embedding = nn.Embedding(config.num_classes + 1, depth) if config.num_classes else None
        cond_depth = depth if uppers or config.num_classes else None

        reach = {"horizontal": config.horizontal, "vertical": config.vertical}
        options: dict[str, Any] = {
            **reach, "norm": config.norm, "vertical_residual": config.vertical_residual, "dropout": config.dropout,
        }  # fmt: skip
        self.embedding = nn.Embedding(self.shape.codebook_size, depth)
        self.pixel_cnn = PixelCNN(
            PixelConvA(depth, depth, cond_depth, **reach),
            *([PixelPosition(depth, self.shape.grid)] if config.position else []),
            *(PixelConvB(depth, depth, cond_depth, **options) for _ in range(config.num_layers)),
        )
        self.head = nn.Sequential(
            ChannelNorm(2 * depth) if config.norm else nn.Identity(),
            nn.Conv2d(2 * depth, depth, 1),
            *(ResidualBlock(depth, 1, config.norm, config.dropout) for _ in range(config.num_output_blocks)),
            nn.ReLU(),
            nn.Conv2d(depth, self.shape.codebook_size, 1),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where codes and labels must be."""
        return self.embedding.weight.device

    def condition(self, label: Tensor | None, upper: Mapping[str, Tensor]) -> Tensor | None:
        """Everything known before the first code, computed once for a batch.

        In training mode labels are hidden with the configured probability.

        Args:
            label: int64 [N] in [-1, num_classes), -1 for "any"; None when the prior takes no label.
            upper: codes of all coarser levels by name, int64 [N, h, w]; other names are not looked at.

        Returns:
            float [N, depth, h, w] when there are coarser levels, float [N, depth] when there is only a label, None when neither.

        Raises:
            CodesError: a coarser level is missing, or a label is given to a prior without labels, or none to one with.
        """
        missing = [name for name in self.upper_names if name not in upper]
        if missing:
            raise CodesError(
                f"level '{self.shape.name}' is conditioned on {', '.join(missing)}, whose codes were not given."
            )
        if (label is None) != (self.label_embedding is None):
            expected = "no label" if self.label_embedding is None else "labels (-1 for any class)"
            raise CodesError(f"a prior with num_classes {self.num_classes} expects {expected}.")
        parts: list[Tensor] = [net(upper[name]) for name, net in zip(self.upper_names, self.uppers, strict=True)]
        if label is not None and self.label_embedding is not None:
            if self.training and self.label_dropout:
                label = label.masked_fill(torch.rand(label.shape, device=label.device) < self.label_dropout, -1)
            embedded = self.label_embedding(label + 1)
            parts.append(embedded[:, :, None, None] if parts else embedded)
        return reduce(torch.add, parts) if parts else None

    def forward(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Logits of every code given those before it in raster order.

        Args:
            codes: int64 [N, h, w] in [0, K). Codes at a position and after it have no influence on that position's logits.
            condition: what `condition()` returned for the same samples.

        Returns:
            float [N, K, h, w].

        Raises:
            CodesError: the grid is not the one that this level was made for.
        """
        height, width = self.shape.grid
        if tuple(codes.shape[1:]) != (height, width):
            raise CodesError(
                f"level '{self.shape.name}': expected codes [N, {height}, {width}], found {list(codes.shape)}."
            )
        vert, horiz = self.pixel_cnn(self.embedding(codes).permute(0, 3, 1, 2), conds=condition)
        return self.head(torch.cat([vert, horiz], dim=1))


class Prior(nn.Module):
    """p(codes | label) over all levels; the levels share a configuration and no weights.

    Attributes:
        config: what it was built from.
        level_priors: one LevelPrior a level, coarse to fine.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.level_priors = nn.ModuleList(LevelPrior(config, index) for index in range(len(config.levels)))

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels' names, coarse to fine."""
        return self.config.level_names

    @property
    def num_parameters(self) -> int:
        """How many numbers are learned, over all levels."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def fingerprint(self) -> str:
        """A name for exactly these weights and this configuration, 32 hex digits; reads all weights each time."""
        return fingerprint(self.state_dict(), self.config.to_dict())

    def level_prior(self, name: str) -> LevelPrior:
        """The network of one level.

        Raises:
            CodesError: there is no such level.
        """
        level_prior = self.level_priors[self.config.level_index(name)]
        assert isinstance(level_prior, LevelPrior)
        return level_prior


def from_preset(
    name: str, levels: Iterable[LevelShape], num_classes: int, tokenizer_fingerprint: str, **overrides: Any
) -> Prior:
    """A new, untrained prior; its weights are drawn from torch's global generator.

    Args:
        name: a key of `PRESETS`.
        levels: the grids of codes, coarse to fine.
        num_classes: labels lie in [0, num_classes); 0 for a prior that takes no label.
        tokenizer_fingerprint: the tokenizer whose codes are modelled.
        **overrides: other values for fields of `PriorConfig`.

    Raises:
        CodesError: unknown preset or field (the nearest name is suggested), or a value out of its range.
    """
    return Prior(preset_config(name, levels, num_classes, tokenizer_fingerprint, **overrides))


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside, the former mode again afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
