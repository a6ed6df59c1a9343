"""What a prior is made of: the code grids it models and the sizes of its networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from priors.network_config import NetworkConfig, check_count, check_keys, network_config
from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

MAX_LEVELS = 8  # a level has a network for each coarser one, so a foreign file must not name thousands


@dataclass(frozen=True)
class LevelShape:
    """One grid of codes: its name, its number of entries and its height and width.

    Attributes:
        name: the level's name in the store, such as `codes`, `top` or `bottom`.
        codebook_size: K; codes lie in [0, K).
        grid: (h, w), in codes.
    """

    name: str
    codebook_size: int
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise CodesError(f"levels: expected a level name, found {self.name!r}.")
        check_count(f"level '{self.name}': codebook_size", self.codebook_size, 1, 1 << 20)
        if not isinstance(self.grid, tuple | list) or len(self.grid) != 2:
            raise CodesError(f"level '{self.name}': expected a grid (h, w), found {self.grid!r}.")
        for side in self.grid:
            check_count(f"level '{self.name}': a side of its grid", side, 1, 1 << 14)
        object.__setattr__(self, "grid", tuple(self.grid))  # JSON brings lists

    @property
    def num_codes(self) -> int:
        """How many codes one sample has at this level: h * w."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class PriorConfig:
    """Everything needed to build a prior; kept in its checkpoint.

    Attributes:
        levels: coarse to fine. A level is modelled given the label and all coarser levels.
        networks: the network of each level.
        num_classes: labels lie in [0, num_classes); 0 for a prior that takes no label.
        tokenizer_fingerprint: the tokenizer whose codes are modelled; see `check_tokenizer`.
        preset: the name that the sizes came from; a record, changed by nothing below.
    """

    levels: tuple[LevelShape, ...]
    networks: tuple[NetworkConfig, ...]
    num_classes: int
    tokenizer_fingerprint: str
    preset: str = "pixelcnn"

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        if not 1 <= len(names) <= MAX_LEVELS or len(set(names)) != len(names):
            raise CodesError(
                f"levels: expected one to {MAX_LEVELS} levels of different names, coarse to fine, found {names}."
            )
        for coarse, fine in pairwise(self.levels):
            if any(b % a for a, b in zip(coarse.grid, fine.grid, strict=True)):
                raise CodesError(
                    f"levels: expected each grid to be a whole multiple of the coarser one before it, found '{coarse.name}' "
                    f"{coarse.grid} before '{fine.name}' {fine.grid}. Give the levels coarse to fine."
                )
        if len(self.networks) != len(names):
            raise CodesError(f"networks: expected one for each of {len(names)} levels, found {len(self.networks)}.")
        for name in ("tokenizer_fingerprint", "preset"):
            if not isinstance(getattr(self, name), str):
                raise CodesError(f"{name}: expected a name, found {getattr(self, name)!r}.")
        check_count("num_classes", self.num_classes, 0, 1 << 20)

    @property
    def level_names(self) -> tuple[str, ...]:
        """The levels' names, coarse to fine."""
        return tuple(level.name for level in self.levels)

    def level_index(self, name: str) -> int:
        """The place of a level, 0 for the coarsest.

        Raises:
            CodesError: there is no such level.
        """
        if name not in self.level_names:
            raise CodesError(
                f"level '{name}': this prior's levels are {', '.join(self.level_names)}.{did_you_mean(name, self.level_names)}"
            )
        return self.level_names.index(name)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Makes sure that codes come from the tokenizer that this prior was made for.

        Raises:
            CodesError: they come from another one.
        """
        if fingerprint != self.tokenizer_fingerprint:
            raise CodesError(
                f"this prior models the codes of tokenizer {self.tokenizer_fingerprint}, but was given tokenizer {fingerprint}: "
                "the same code means something else there. Use the tokenizer that made the prior's codes, or train a prior for this one."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `from_dict` makes an equal configuration."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "levels": [asdict(level) | {"grid": list(level.grid)} for level in self.levels],
            "networks": [network.to_dict() for network in self.networks],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PriorConfig:
        """The configuration that `to_dict` described.

        Raises:
            CodesError: a key is unknown or missing, or a value is out of its range or of another kind.
        """
        check_keys("the prior's configuration", values, cls)
        for name in ("levels", "networks"):
            if not isinstance(values[name], list | tuple):
                raise CodesError(f"{name}: expected a list, coarse to fine, found {values[name]!r}.")
        for level in values["levels"]:
            check_keys("a level of the prior's configuration", level, LevelShape)
        levels = tuple(LevelShape(**level) for level in values["levels"])
        networks = tuple(network_config(network) for network in values["networks"])
        return cls(**{**values, "levels": levels, "networks": networks})
