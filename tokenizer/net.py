"""What every architecture is: pixels to codes and back, through a quantizer for each level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.fsq import FSQuantizer
from tokenizer.quantized import Quantized, Quantizer
from tokenizer.quantizers import CodebookQuantizer, EMAQuantizer, GradientQuantizer, Recipe
from tokenizer.residual import ResidualQuantizer

Quantize = Callable[[str, Tensor], Tensor]  # a level's name and its features -> its vectors


@dataclass(frozen=True)
class Coded:
    """What a network makes of images.

    Attributes:
        outputs: float [N, output_channels, H, W]; `tokenizer.losses` says how they become pixels.
        levels: each level's quantized features, coarse to fine.
        auxiliary: scalar, losses of the architecture's own; None when it has none.
    """

    outputs: Tensor
    levels: dict[str, Quantized]
    auxiliary: Tensor | None = None


class Net(nn.Module, ABC):
    """A network with one quantizer a level; images are float [N, input_channels, H, W] in [-1, 1].

    Args:
        config: sizes and recipe.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({name: _quantizer(config) for name in config.level_names})

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizer of each level, coarse to fine."""
        return dict(self.levels)  # pyright: ignore[reportReturnType] - a ModuleDict does not know what it holds

    @abstractmethod
    def forward(self, images: Tensor) -> Coded:
        """Reconstructs images, differentiably."""

    @abstractmethod
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Images -> for each level codes, int64 [N, *grid]."""

    @abstractmethod
    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """Codes as `encode` gives them -> float [N, output_channels, H, W]."""


def _quantizer(config: TokenizerConfig) -> Quantizer:
    if config.quantizer == "fsq":
        return FSQuantizer(config.fsq_levels)
    stages = [_stage(config) for _ in range(config.num_quantizers)]
    return ResidualQuantizer(stages) if len(stages) > 1 else stages[0]


def _stage(config: TokenizerConfig) -> CodebookQuantizer:
    kind = EMAQuantizer if config.quantizer == "ema" else GradientQuantizer
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
    return kind(config.codebook_size, config.code_dim, recipe)
