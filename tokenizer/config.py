"""What a tokenizer is made of: its sizes, its quantizer, and the recipe by which its codebooks learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

CHOICES = {
    "architecture": ("strided", "unixpickle", "grouped"),
    "quantizer": ("ema", "gradient", "fsq"),
    "codebook_start": ("kmeans", "uniform", "normal"),
    "revival": ("rare", "unused", "none"),
    "loss": ("mse", "l1", "log_laplace"),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything needed to build a tokenizer; kept in its checkpoint and hashed into its fingerprint.

    Attributes:
        preset: the name that the sizes came from; a record.
        architecture: `strided` (van den Oord et al. 2017; with more levels Razavi et al. 2019), `unixpickle` (its vq-vae-2) or `grouped`
            (DALL-E's blocks; one level).
        channels: C of the images, 1 (grey) or 3 (RGB).
        size: height and width of the training images in pixels. The nets are convolutional: any multiple of `downsample` works.
        frames: T; with more than 1, clips [N, T, C, H, W] are coded, their frames stacked as channels.
        num_levels: grids of codes, each with half the side of the next; 1 for a VQ-VAE.
        hidden_dim: channels of encoders and decoders (128 in Razavi et al. 2019); `grouped`: of the first group.
        residual_dim: channels inside a residual block (64 there); `unixpickle`: hidden_dim; `grouped`: a quarter of hidden_dim.
        num_residual_blocks: residual blocks of each encoder and decoder (2 there); `grouped`: of each group.
        residual_bias: whether the convolutions of residual blocks have a bias (zalandoresearch's have none).
        num_groups: `grouped` only: groups of blocks, with a halving of the side between them; else 0.
        quantizer: `ema` (codebooks follow by moving averages), `gradient` (they are learned like weights) or `fsq` (Mentzer et al. 2023:
            rounding, no codebook to learn).
        codebook_size: K, the number of entries of each level's codebook; `fsq`: the product of fsq_levels.
        code_dim: D, the width of an entry; `unixpickle`: hidden_dim; `fsq`: the number of fsq_levels.
        fsq_levels: `fsq` only: how many values each dimension of an entry can take.
        num_quantizers: more than 1 quantizes what the one before left over (residual quantization): codes [N, num_quantizers, h, w].
        normalize: entries and features have length 1, so that the nearest is the one with the highest cosine (Yu et al. 2021).
        rotation: gradients pass a quantizer turned and scaled as the feature was (Fifty et al. 2024), not straight through.
        codebook_start: `kmeans` (k-means++ after start_step updates; ours, measured), `uniform` in [-1/K, 1/K] (zalandoresearch) or
            `normal` (standard; unixpickle).
        start_step: `kmeans` only: updates as a plain autoencoder before the first codebook, at least 1 (ours, measured).
        revival: `rare` (codes used less than revive_fraction of the mean are replaced; ours, measured), `unused` (those not used for
            revive_after updates; unixpickle) or `none`.
        revive_fraction: see revival, in [0, 1).
        revive_after: see revival, in updates (100 in unixpickle).
        pool_size: encoder outputs that each micro-batch offers for the `kmeans` start and for revivals (ours, measured).
        commitment_cost: beta, the weight of the commitment loss (0.25 in both papers).
        ema_decay: what an update keeps of the codebook statistics, in [0, 1) (0.99 in both); `gradient`: of how often codes are used, by
            which `rare` revives them and the finished codebook is sorted.
        loss: of the reconstruction: `mse` (over the variance of the data), `l1` (over its standard deviation) or `log_laplace` (Ramesh et
            al. 2021, appendix A.3: the decoder gives a scale beside each pixel).
        pixel_range: low and high, what black and white are inside the networks. Images are converted on their way in and out, so that
            imported weights see what they were trained on; images given to a tokenizer are always uint8 or in [-1, 1].
        rectified_skip: residual blocks add to relu(x), not to x: what zalandoresearch's do, whose first ReLU overwrites its input.
    """

    preset: str = "custom"
    architecture: str = "strided"
    channels: int = 3
    size: int = 32
    frames: int = 1
    num_levels: int = 1
    hidden_dim: int = 128
    residual_dim: int = 64
    num_residual_blocks: int = 2
    residual_bias: bool = True
    num_groups: int = 0
    quantizer: str = "ema"
    codebook_size: int = 512
    code_dim: int = 64
    fsq_levels: tuple[int, ...] = ()
    num_quantizers: int = 1
    normalize: bool = False
    rotation: bool = False
    codebook_start: str = "kmeans"
    start_step: int = 50
    revival: str = "rare"
    revive_fraction: float = 0.2
    revive_after: int = 100
    pool_size: int = 4096
    commitment_cost: float = 0.25
    ema_decay: float = 0.99
    loss: str = "mse"
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    rectified_skip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str):
            raise CodesError(f"preset: expected a name, found {self.preset!r}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = did_you_mean(value, choices) if isinstance(value, str) else ""
                raise CodesError(f"{name}: expected one of {', '.join(choices)}, found {value!r}.{near}")
        for name, low, high in (
            ("channels", 1, 3),
            ("size", 1, 1 << 14),
            ("frames", 1, 1 << 10),
            ("num_levels", 1, 8),
            ("hidden_dim", 2, 1 << 14),
            ("residual_dim", 1, 1 << 14),
            ("num_residual_blocks", 0, 64),
            ("num_groups", 0, 8),
            ("codebook_size", 2, 1 << 20),
            ("code_dim", 1, 1 << 14),
            ("num_quantizers", 1, 64),
            ("start_step", 1, 1 << 40),
            ("revive_after", 1, 1 << 40),
            ("pool_size", 1, 1 << 24),
        ):
            _check_count(name, getattr(self, name), low, high)
        for name in ("residual_bias", "normalize", "rotation", "rectified_skip"):
            if not isinstance(getattr(self, name), bool):
                raise CodesError(f"{name}: expected true or false, found {getattr(self, name)!r}.")
        _check_real("commitment_cost", self.commitment_cost, below=None)
        _check_real("ema_decay", self.ema_decay, below=1.0)
        _check_real("revive_fraction", self.revive_fraction, below=1.0)
        self._check_pixel_range()
        self._check_quantizer()
        self._check_architecture()

    def _check_pixel_range(self) -> None:
        found = self.pixel_range
        if (
            not isinstance(found, (list, tuple))
            or len(found) != 2
            or not all(map(_is_finite, found))
            or found[0] >= found[1]
        ):
            raise CodesError(f"pixel_range: expected [low, high] with low < high, such as [0, 1], found {found!r}.")
        object.__setattr__(self, "pixel_range", (float(found[0]), float(found[1])))
        if self.loss == "log_laplace" and self.pixel_range != (-1.0, 1.0):
            raise CodesError("pixel_range: loss 'log_laplace' has outputs of its own kind; leave it at [-1, 1].")

    def _check_quantizer(self) -> None:
        levels = self.fsq_levels
        if not isinstance(levels, (list, tuple)):  # JSON and TOML bring lists
            raise CodesError(f"fsq_levels: expected a list of whole numbers, found {levels!r}.")
        object.__setattr__(self, "fsq_levels", tuple(levels))
        if self.normalize and self.num_quantizers > 1:
            raise CodesError(
                "normalize: what a stage of num_quantizers > 1 leaves over has no length of 1. Choose one of the two."
            )
        if self.first_update and self.pool_size < self.codebook_size:
            raise CodesError(
                f"pool_size: expected codebook_size, {self.codebook_size}, or more for the k-means start, found {self.pool_size}."
            )
        if self.quantizer != "fsq":
            if levels:
                raise CodesError(
                    f"fsq_levels: only for quantizer = 'fsq', which is {self.quantizer!r}. Set them to []."
                )
            return
        if not levels:
            raise CodesError("fsq_levels: quantizer = 'fsq' needs them, for example [8, 5, 5, 5] for 1,000 codes.")
        for count in levels:
            _check_count("fsq_levels", count, 2, 1 << 10)
        if self.codebook_size != math.prod(levels) or self.code_dim != len(levels):
            raise CodesError(
                f"fsq_levels {list(levels)}: expected codebook_size {math.prod(levels)} (their product) and code_dim {len(levels)} (their "
                f"number), found {self.codebook_size} and {self.code_dim}."
            )
        if self.normalize or self.rotation or self.num_quantizers > 1:
            raise CodesError(
                "quantizer = 'fsq' has no normalize, rotation or num_quantizers: nothing in it is learned."
            )

    def _check_architecture(self) -> None:
        if self.channels == 2:
            raise CodesError("channels: expected 1 (grey) or 3 (RGB), found 2.")
        if (self.num_groups > 0) != (self.architecture == "grouped") or self.num_groups == 1:
            raise CodesError(
                f"num_groups: expected 2 or more for architecture 'grouped' and 0 for others, found {self.num_groups} for {self.architecture!r}."
            )
        if not self.residual_bias and self.architecture != "strided":
            raise CodesError(
                f"residual_bias: only 'strided' can go without, the architecture is {self.architecture!r}."
            )
        if self.rectified_skip and self.architecture != "strided":
            raise CodesError(f"rectified_skip: only for architecture 'strided', which is {self.architecture!r}.")
        if self.architecture == "strided" and self.hidden_dim % 2:
            raise CodesError(
                f"hidden_dim: expected an even number (the outer layers have half), found {self.hidden_dim}."
            )
        if self.architecture == "unixpickle" and not self.hidden_dim == self.residual_dim == self.code_dim:
            raise CodesError(
                "architecture 'unixpickle' has one width: expected hidden_dim, residual_dim and code_dim to be equal, found "
                f"{self.hidden_dim}, {self.residual_dim} and {self.code_dim}."
            )
        if self.architecture == "grouped":
            if self.num_levels > 1 or self.num_residual_blocks < 1:
                raise CodesError(
                    f"architecture 'grouped' has one level and 1 block a group at least, found num_levels {self.num_levels} and "
                    f"num_residual_blocks {self.num_residual_blocks}."
                )
            if self.residual_dim * 4 != self.hidden_dim:
                raise CodesError(
                    "architecture 'grouped': expected residual_dim to be a quarter of hidden_dim, found "
                    f"{self.residual_dim} and {self.hidden_dim}."
                )
        if self.size % self.downsample:
            raise CodesError(f"size: expected a multiple of {self.downsample} pixels, found {self.size}.")

    @property
    def level_names(self) -> tuple[str, ...]:
        """The levels, coarse to fine.

        >>> TokenizerConfig(num_levels=3).level_names
        ('top', 'middle', 'bottom')
        """
        if self.num_levels == 1:
            return ("codes",)
        number = self.num_levels - 2
        middle = ("middle",) if number == 1 else tuple(f"middle{place}" for place in range(1, number + 1))
        return ("top", *middle, "bottom")

    @property
    def finest_downsample(self) -> int:
        """Pixels per code of the finest level, along a side."""
        return 2 ** (self.num_groups - 1) if self.architecture == "grouped" else 4

    @property
    def downsample(self) -> int:
        """Image sides must be multiples of this: pixels per code of the coarsest level, along a side."""
        return self.finest_downsample * 2 ** (self.num_levels - 1)

    @property
    def input_channels(self) -> int:
        """Channels that the networks see: those of all frames."""
        return self.channels * self.frames

    @property
    def output_channels(self) -> int:
        """Channels that the networks give: `log_laplace` has a scale beside each value."""
        return self.input_channels * (2 if self.loss == "log_laplace" else 1)

    @property
    def first_update(self) -> int:
        """Updates before codebooks begin: 0 unless k-means makes them."""
        return self.start_step if self.quantizer != "fsq" and self.codebook_start == "kmeans" else 0

    def grid(self, level: str, size: int | None = None) -> tuple[int, ...]:
        """The shape of a level's codes for one image: (h, w), with residual quantization (num_quantizers, h, w).

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
        side = size // self.downsample * 2 ** self.level_names.index(level)
        return (side, side) if self.num_quantizers == 1 else (self.num_quantizers, side, side)

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `from_dict` makes an equal configuration."""
        return {**asdict(self), "fsq_levels": list(self.fsq_levels), "pixel_range": list(self.pixel_range)}

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
            raise CodesError(
                f"the tokenizer's configuration lacks {', '.join(missing)}. If an earlier version of vqmill wrote it, train it again."
            )
        return cls(**values)


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CodesError(f"{name}: expected a whole number in {low}..{high}, found {value!r}.")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_real(name: str, value: float, below: float | None) -> None:
    if not _is_finite(value) or not 0 <= value < (float("inf") if below is None else below):  # JSON may bring anything
        limit = "a finite number of at least 0" if below is None else f"a number in [0, {below:g})"
        raise CodesError(f"{name}: expected {limit}, found {value!r}.")
