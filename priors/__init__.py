"""Models over grids of codes: gated PixelCNN, alone or in a hierarchy, and sampling from them.

Example:
    prior = priors.from_preset("pixelcnn", [LevelShape("codes", 256, (7, 7))], num_classes=10, tokenizer_fingerprint=...)
    step = priors.PriorStep(prior, "codes")        # trained by whoever has an optimizer; then
    priors.save(prior, folder)
    codes = priors.sample(priors.load(folder), num=64, labels=labels, seed=0)
"""

from __future__ import annotations

from priors.config import PRESETS, LevelShape, PriorConfig, preset_config
from priors.hierarchy import LevelPrior, Prior, from_preset
from priors.likelihood import Baselines, baselines, score
from priors.pixelcnn import ChannelNorm, PixelCNN, PixelConvA, PixelConvB, PixelPosition
from priors.sampling import run, sample
from priors.saving import FILE_NAME, load, save
from priors.step import PriorStep

__all__ = [
    "FILE_NAME",
    "PRESETS",
    "Baselines",
    "ChannelNorm",
    "LevelPrior",
    "LevelShape",
    "PixelCNN",
    "PixelConvA",
    "PixelConvB",
    "PixelPosition",
    "Prior",
    "PriorConfig",
    "PriorStep",
    "baselines",
    "from_preset",
    "load",
    "preset_config",
    "run",
    "sample",
    "save",
    "score",
]
