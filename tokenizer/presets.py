"""Named configurations: our own, and those that reproduce a published tokenizer (docs/tokenizers.md has a page for each)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tokenizer.config import TokenizerConfig
from tokenizer.rules import refuse_unread
from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

# What the sources do: codebooks of random numbers, and nothing that brings back a code which is no longer used.
_CLASSIC = {"codebook_start": "uniform", "revival": "none"}
_CLASSIC_VQVAE = {"hidden_dim": 128, "residual_dim": 32, "code_dim": 64, "codebook_size": 512, **_CLASSIC}

PRESETS: dict[str, dict[str, Any]] = {
    # ours: sizes for two CPU cores, except rgb256, which has the widths of Razavi et al. 2019
    "grey28": {"channels": 1, "size": 28, "codebook_size": 256, "code_dim": 32, "hidden_dim": 64, "residual_dim": 32},
    "rgb32": {"size": 32, "num_levels": 2, "hidden_dim": 96, "residual_dim": 32, "start_step": 100},
    "rgb256": {"size": 256, "num_levels": 2, "start_step": 100},
    "fsq32": {
        "size": 32, "hidden_dim": 96, "residual_dim": 32, "quantizer": "fsq", "fsq_levels": (8, 5, 5, 5), "codebook_size": 1000, "code_dim": 4,
    },
    "dalle64": {
        "architecture": "grouped", "size": 64, "num_groups": 4, "hidden_dim": 48, "residual_dim": 12, "num_residual_blocks": 1,
        "codebook_size": 1024, "code_dim": 64, "loss": "log_laplace",
    },
    # published ones
    "nngen_mnist": {"channels": 1, "size": 28, **_CLASSIC_VQVAE, "quantizer": "gradient"},
    "zalando_cifar": {"size": 32, **_CLASSIC_VQVAE, "residual_bias": False, "rectified_skip": True, "pixel_range": (-0.5, 0.5)},
    "sonnet_cifar": {"size": 32, **_CLASSIC_VQVAE, "pixel_range": (-0.5, 0.5)},
    "unixpickle_256": {
        "architecture": "unixpickle", "size": 256, "num_levels": 2, "hidden_dim": 128, "residual_dim": 128, "code_dim": 128,
        "quantizer": "gradient", "codebook_start": "normal", "revival": "unused", "revive_after": 100, "pixel_range": (0.0, 1.0),
    },
    "video_stacked_13m": {
        "architecture": "grouped", "size": 256, "frames": 30, "num_groups": 4, "hidden_dim": 64, "residual_dim": 16,
        "num_residual_blocks": 1, "codebook_size": 8192, "code_dim": 512, "codebook_start": "normal", "revival": "none",
    },
    # the same for a laptop, with our recipe
    "video_stacked_small": {
        "architecture": "grouped", "size": 64, "frames": 8, "num_groups": 4, "hidden_dim": 32, "residual_dim": 8,
        "num_residual_blocks": 1, "codebook_size": 512, "code_dim": 64,
    },
}  # fmt: skip


def preset_config(name: str, /, **overrides: Any) -> TokenizerConfig:
    """The configuration of a preset; `overrides` are other values for fields of `TokenizerConfig`.

    Raises:
        CodesError: unknown preset or field (the nearest name is suggested), a value out of its range, or one that nothing reads
            beside the others (see `tokenizer.rules`).
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
    config = TokenizerConfig(**{"preset": name, **PRESETS[name], **overrides})
    refuse_unread(config, overrides)
    return config
