"""tokenizer: models that turn pixels into codes and back.

>>> import torch, tokenizer
>>> model = tokenizer.from_preset("grey28")
>>> codes = model.encode(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
>>> codes["codes"].shape, model.decode(codes).shape
(torch.Size([2, 7, 7]), torch.Size([2, 1, 28, 28]))
"""

from typing import Any

from tokenizer.config import TokenizerConfig
from tokenizer.evaluation import Evaluation, evaluate
from tokenizer.fsq import FSQuantizer
from tokenizer.models import Reconstruction, Tokenizer
from tokenizer.presets import PRESETS, preset_config
from tokenizer.quantized import Quantized, Quantizer
from tokenizer.quantizers import EMAQuantizer, GradientQuantizer, Recipe
from tokenizer.residual import ResidualQuantizer
from tokenizer.saving import FILE_NAME, dumps, load, loads, save
from tokenizer.step import TokenizerStep

__all__ = [
    "FILE_NAME",
    "PRESETS",
    "EMAQuantizer",
    "Evaluation",
    "FSQuantizer",
    "GradientQuantizer",
    "Quantized",
    "Quantizer",
    "Recipe",
    "Reconstruction",
    "ResidualQuantizer",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerStep",
    "dumps",
    "evaluate",
    "from_preset",
    "load",
    "loads",
    "preset_config",
    "save",
]


def from_preset(name: str, /, **overrides: Any) -> Tokenizer:
    """A new, untrained tokenizer.

    Args:
        name: one of `PRESETS`.
        overrides: other values for fields of `TokenizerConfig`, such as `codebook_size=1024`.

    Raises:
        CodesError: see `preset_config`.
    """
    return Tokenizer(preset_config(name, **overrides))
