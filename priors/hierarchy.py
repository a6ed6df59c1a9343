"""A prior over a hierarchy of code grids: p(top | label) p(bottom | top, label), one network a level.

Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from priors.config import LevelShape, PriorConfig
from priors.level import LevelPrior
from priors.presets import preset_config
from vqmill.checkpoint import fingerprint


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
    name: str, levels: Iterable[LevelShape], num_classes: int, tokenizer_fingerprint: str, /, **overrides: Any
) -> Prior:
    """A new, untrained prior of a preset; see `preset_config` for what is given and raised. Its weights are drawn from torch's global generator."""
    return Prior(preset_config(name, levels, num_classes, tokenizer_fingerprint, **overrides))
