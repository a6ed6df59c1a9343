"""Models over grids of codes: gated PixelCNN or a small GPT, alone or in a hierarchy, and sampling from them.

Example:
    prior = priors.from_preset("pixelcnn", [LevelShape("codes", 256, (7, 7))], 10, tokenizer.fingerprint)
    step = priors.PriorStep(prior, "codes")        # trained by whoever has an optimizer; then
    priors.save(prior, folder)
    codes = priors.sample(priors.load(folder), num=64, labels=labels, seed=0)
"""

from __future__ import annotations

from priors.attention import CausalAttention, PixelAttention
from priors.blocks import ChannelNorm
from priors.config import LevelShape, PriorConfig
from priors.hierarchy import Prior, from_preset
from priors.level import LevelPrior
from priors.likelihood import Baselines, baselines, bits_per_code, score
from priors.network_config import GPTConfig, NetworkConfig, PixelCNNConfig
from priors.pixelcnn import PixelCNN, PixelConvA, PixelConvB, PixelPosition
from priors.presets import PRESETS, preset_config
from priors.running import run, run_to_fixed_point
from priors.sampling import check_sampling, sample
from priors.saving import FILE_NAME, load, save
from priors.selecting import Drawing
from priors.step import PriorStep

__all__ = [
    "FILE_NAME",
    "PRESETS",
    "Baselines",
    "CausalAttention",
    "ChannelNorm",
    "Drawing",
    "GPTConfig",
    "LevelPrior",
    "LevelShape",
    "NetworkConfig",
    "PixelAttention",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelConvA",
    "PixelConvB",
    "PixelPosition",
    "Prior",
    "PriorConfig",
    "PriorStep",
    "baselines",
    "bits_per_code",
    "check_sampling",
    "from_preset",
    "load",
    "preset_config",
    "run",
    "run_to_fixed_point",
    "sample",
    "save",
    "score",
]
