"""What a tokenizer is made of: its sizes, and the recipe by which its codebooks learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

BOTTOM_STRIDE = 4  # both papers: the (bottom) encoder halves the image twice


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything needed to build a tokenizer; kept in its checkpoint and hashed into its fingerprint.

    Attributes:
        preset: the name that the sizes came from; a record.
        channels: C of the images, 1 (grey) or 3 (RGB).
        size: height and width of the training images in pixels. The nets are convolutional: any multiple of `downsample` works.
        codebook_size: K, the number of entries of each level's codebook.
        code_dim: D, the width of an entry.
        hidden_dim: channels of the encoders and decoders (128 in Razavi et al. 2019).
        residual_dim: channels inside a residual block (64 there).
        num_residual_blocks: residual blocks of each encoder and decoder (2 there).
        num_levels: 1 for a VQ-VAE (van den Oord et al. 2017), 2 for a VQ-VAE-2 (Razavi et al. 2019).
        commitment_cost: beta, the weight of the commitment loss (0.25 in both).
        ema_decay: what an update keeps of the codebook statistics, in [0, 1) (0.99 in both).
        start_step: updates as a plain autoencoder before k-means++ makes the first codebook, at least 1 (ours, measured).
        revive_fraction: a code used less than this fraction of the mean use is replaced, in [0, 1); 0 replaces none (ours, measured).
        pool_size: encoder outputs that each micro-batch offers for the first codebook and for revivals (ours, measured).
    """

    preset: str = "custom"
    channels: int = 3
    size: int = 32
    codebook_size: int = 512
    code_dim: int = 64
    hidden_dim: int = 128
    residual_dim: int = 64
    num_residual_blocks: int = 2
    num_levels: int = 1
    commitment_cost: float = 0.25
    ema_decay: float = 0.99
    start_step: int = 100
    revive_fraction: float = 0.03
    pool_size: int = 4096

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str):
            raise CodesError(f"preset: expected a name, found {self.preset!r}.")
        for name, low, high in (
            ("channels", 1, 3),
            ("size", 1, 1 << 14),
            ("codebook_size", 2, 1 << 20),
            ("code_dim", 1, 1 << 14),
            ("hidden_dim", 2, 1 << 14),
            ("residual_dim", 1, 1 << 14),
            ("num_residual_blocks", 0, 64),
            ("num_levels", 1, 2),
            ("start_step", 1, 1 << 40),
            ("pool_size", 1, 1 << 24),
        ):
            _check_count(name, getattr(self, name), low, high)
        if self.channels == 2:
            raise CodesError("channels: expected 1 (grey) or 3 (RGB), found 2.")
        if self.hidden_dim % 2:
            raise CodesError(
                f"hidden_dim: expected an even number (the outer layers have half), found {self.hidden_dim}."
            )
        if self.size % self.downsample:
            raise CodesError(f"size: expected a multiple of {self.downsample} pixels, found {self.size}.")
        _check_real("commitment_cost", self.commitment_cost, below=None)
        _check_real("ema_decay", self.ema_decay, below=1.0)
        _check_real("revive_fraction", self.revive_fraction, below=1.0)

    @property
    def level_names(self) -> tuple[str, ...]:
        """The levels, coarse to fine."""
        return ("codes",) if self.num_levels == 1 else ("top", "bottom")

    @property
    def downsample(self) -> int:
        """Image sides must be multiples of this: pixels per code of the coarsest level, along a side."""
        return BOTTOM_STRIDE if self.num_levels == 1 else 2 * BOTTOM_STRIDE

    def grid(self, level: str, size: int | None = None) -> tuple[int, int]:
        """The height and width of a level's code grid.

        Args:
            level: one of `level_names`.
            size: height and width of the image in pixels; the training size when None.

        Raises:
            CodesError: no such level, or a size that is not a multiple of `downsample`.
        """
        if level not in self.level_names:
            raise CodesError(
                f"level '{level}': this tokenizer's levels are {', '.join(self.level_names)}.{did_you_mean(level, self.level_names)}"
            )
        size = self.size if size is None else size
        if size < 1 or size % self.downsample:
            raise CodesError(f"size: expected a positive multiple of {self.downsample} pixels, found {size}.")
        side = size // (2 * BOTTOM_STRIDE if level == "top" else BOTTOM_STRIDE)
        return side, side

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `from_dict` makes an equal configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenizerConfig:
        """The configuration that `to_dict` described.

        Raises:
            CodesError: a key is unknown or missing, or a value is out of its range.
        """
        expected = [field.name for field in fields(cls)]
        for key in values:
            if key not in expected:
                raise CodesError(
                    f"tokenizer option '{key}': expected one of {', '.join(expected)}.{did_you_mean(key, expected)}"
                )
        missing = [name for name in expected if name not in values]
        if missing:
            raise CodesError(f"the tokenizer's configuration lacks {', '.join(missing)}.")
        return cls(**values)


# Sizes for two CPU cores, except rgb256, which has the widths of Razavi et al. 2019.
PRESETS: dict[str, dict[str, Any]] = {
    "grey28": {"channels": 1, "size": 28, "codebook_size": 256, "code_dim": 32, "hidden_dim": 64, "residual_dim": 32},
    "rgb32": {"channels": 3, "size": 32, "num_levels": 2, "hidden_dim": 96, "residual_dim": 32},
    "rgb256": {"channels": 3, "size": 256, "num_levels": 2},
}


def preset_config(name: str, **overrides: Any) -> TokenizerConfig:
    """The configuration of a preset; `overrides` are other values for fields of `TokenizerConfig`.

    Raises:
        CodesError: unknown preset or field (the nearest name is suggested), or a value out of its range.
    """
    if name not in PRESETS:
        raise CodesError(
            f"tokenizer preset '{name}': expected one of {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    adjustable = [field.name for field in fields(TokenizerConfig) if field.name != "preset"]
    for key in overrides:
        if key not in adjustable:
            raise CodesError(
                f"tokenizer option '{key}': expected one of {', '.join(adjustable)}.{did_you_mean(key, adjustable)}"
            )
    return TokenizerConfig(**{"preset": name, **PRESETS[name], **overrides})


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CodesError(f"{name}: expected a whole number in {low}..{high}, found {value!r}.")


def _check_real(name: str, value: float, below: float | None) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)  # JSON may bring anything
    if not real or not 0 <= value < (float("inf") if below is None else below):
        limit = "a finite number of at least 0" if below is None else f"a number in [0, {below:g})"
        raise CodesError(f"{name}: expected {limit}, found {value!r}.")
