"""A prior over a hierarchy of code grids: p(top | label) p(bottom | top, label), one network a level.

Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from priors.config import LevelShape, PriorConfig
from priors.level import LevelPrior
from priors.presets import preset_config
from vqmill.checkpoint import fingerprint
from vqmill.errors import CodesError


class Prior(nn.Module):
    """p(codes | label) over all levels; the levels share a configuration and no weights.

    Args:
        config: what it is built from.
        class_names: names of the classes by label, as many as are known; "" for a class without one. They are for people: saved beside
            the configuration, and no part of the fingerprint, so that the same weights stay the same prior by whatever names.

    Attributes:
        config: what it was built from.
        class_names: the names.
        level_priors: one LevelPrior a level, coarse to fine.

    Raises:
        CodesError: the names are no list of texts, or more than there are classes.
    """

    def __init__(self, config: PriorConfig, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.class_names = _checked_names(class_names, config.num_classes)
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


def _checked_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CodesError(f"class_names: expected a list of names, found {names!r}.")
    if len(names) > num_classes:
        raise CodesError(f"class_names: expected {num_classes} at most, one for each class, found {len(names)}.")
    return tuple(names)
