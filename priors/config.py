"""What a prior is made of: the code grids it models and the sizes of its networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

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
        _check_count(f"level '{self.name}': codebook_size", self.codebook_size, 1, 1 << 20)
        if not isinstance(self.grid, tuple | list) or len(self.grid) != 2:
            raise CodesError(f"level '{self.name}': expected a grid (h, w), found {self.grid!r}.")
        for side in self.grid:
            _check_count(f"level '{self.name}': a side of its grid", side, 1, 1 << 14)
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
        num_classes: labels lie in [0, num_classes); 0 for a prior that takes no label.
        tokenizer_fingerprint: the tokenizer whose codes are modelled; see `check_tokenizer`.
        preset: the name that the sizes came from; a record, changed by nothing below.
        depth: channels of every layer.
        num_layers: PixelConvB layers after the one PixelConvA (ours: with it, 8 of reach 1 see a grid of 8 x 8 whole).
        horizontal: how far one layer sees to the left (and, in rows above, to the right), in codes.
        vertical: how far one layer sees upward, in codes.
        norm: LayerNorm over channels before each layer and before the output stack.
        vertical_residual: residual connections in the vertical stack too; the horizontal stack always has them.
        position: learned vectors for each place of the grid.
        num_output_blocks: residual 1x1 blocks between the two stacks and the logits.
        num_condition_blocks: residual 3x3 blocks that each coarser level goes through.
        dropout: probability at which activations are dropped in training, in [0, 1) (ours).
        label_dropout: probability at which a label is hidden in training, in [0, 1), so that label -1 ("any") is learned.
    """

    levels: tuple[LevelShape, ...]
    num_classes: int
    tokenizer_fingerprint: str
    preset: str = "pixelcnn"
    depth: int = 64
    num_layers: int = 8
    horizontal: int = 1
    vertical: int = 1
    norm: bool = True
    vertical_residual: bool = True
    position: bool = True
    num_output_blocks: int = 1
    num_condition_blocks: int = 2
    dropout: float = 0.1
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        levels = tuple(self.levels)
        object.__setattr__(self, "levels", levels)
        names = [level.name for level in levels]
        if not 1 <= len(names) <= MAX_LEVELS or len(set(names)) != len(names):
            raise CodesError(
                f"levels: expected one to {MAX_LEVELS} levels of different names, coarse to fine, found {names}."
            )
        for coarse, fine in pairwise(levels):
            if any(b % a for a, b in zip(coarse.grid, fine.grid, strict=True)):
                raise CodesError(
                    f"levels: expected each grid to be a whole multiple of the coarser one before it, found '{coarse.name}' "
                    f"{coarse.grid} before '{fine.name}' {fine.grid}. Give the levels coarse to fine."
                )
        for name in ("tokenizer_fingerprint", "preset"):
            if not isinstance(getattr(self, name), str):
                raise CodesError(f"{name}: expected a name, found {getattr(self, name)!r}.")
        for name, low, high in (
            ("num_classes", 0, 1 << 20),
            ("depth", 1, 1 << 14),
            ("num_layers", 0, 256),
            ("horizontal", 1, 64),
            ("vertical", 1, 64),
            ("num_output_blocks", 0, 64),
            ("num_condition_blocks", 0, 64),
        ):
            _check_count(name, getattr(self, name), low, high)
        for name in ("norm", "vertical_residual", "position"):
            if not isinstance(getattr(self, name), bool):
                raise CodesError(f"{name}: expected true or false, found {getattr(self, name)!r}.")
        for name in ("dropout", "label_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise CodesError(f"{name}: expected a probability in [0, 1), found {value!r}.")

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
        return asdict(self) | {"levels": [asdict(level) | {"grid": list(level.grid)} for level in self.levels]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PriorConfig:
        """The configuration that `to_dict` described.

        Raises:
            CodesError: a key is unknown or missing, or a value is out of its range or of another kind.
        """
        check_keys("the prior's configuration", values, cls)
        if not isinstance(values["levels"], list | tuple):
            raise CodesError(f"levels: expected a list of levels, coarse to fine, found {values['levels']!r}.")
        for level in values["levels"]:
            check_keys("a level of the prior's configuration", level, LevelShape)
        return cls(**{**values, "levels": tuple(LevelShape(**level) for level in values["levels"])})


# A training step of 64 samples on two CPU cores: tiny 0.04 s on an 8x8 grid; pixelcnn 0.15 s on 7x7, 0.07 s on 4x4 and 0.25 s on 8x8
# under 4x4; large 0.8 s on 7x7. The reach of one layer is 1: the layers make it up, and small kernels cost less per layer.
PRESETS: dict[str, dict[str, Any]] = {
    "pixelcnn-tiny": {"depth": 32, "num_layers": 4, "dropout": 0.0},
    "pixelcnn": {},
    "pixelcnn-large": {"depth": 128, "num_layers": 14, "num_output_blocks": 2, "num_condition_blocks": 4},
}


def preset_config(
    name: str, levels: Iterable[LevelShape], num_classes: int, tokenizer_fingerprint: str, **overrides: Any
) -> PriorConfig:
    """The configuration of a preset for given grids; `overrides` are other values for fields of `PriorConfig`.

    Raises:
        CodesError: unknown preset or field (the nearest name is suggested), or a value out of its range.
    """
    if name not in PRESETS:
        raise CodesError(f"prior preset '{name}': expected one of {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}")
    given = {
        "levels": tuple(levels),
        "num_classes": num_classes,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "preset": name,
    }
    adjustable = [field.name for field in fields(PriorConfig) if field.name not in given]
    for key in overrides:
        if key not in adjustable:
            raise CodesError(
                f"prior option '{key}': expected one of {', '.join(adjustable)}.{did_you_mean(key, adjustable)}"
            )
    return PriorConfig(**{**given, **PRESETS[name], **overrides})


def check_keys(what: str, values: Mapping[str, Any], kind: type[LevelShape] | type[PriorConfig]) -> None:
    """Raises CodesError unless `values` is an object whose keys are exactly the fields of the dataclass `kind`."""
    if not isinstance(values, Mapping):
        raise CodesError(f"{what}: expected an object, found {values!r}.")
    expected = [field.name for field in fields(kind)]
    for key in values:
        if key not in expected:
            raise CodesError(
                f"{what}: unknown key '{key}', expected {', '.join(expected)}.{did_you_mean(key, expected)}"
            )
    missing = [key for key in expected if key not in values]
    if missing:
        raise CodesError(f"{what}: missing {', '.join(missing)}.")


def _check_count(what: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CodesError(f"{what}: expected a whole number in {low}..{high}, found {value!r}.")
