"""Reads weights that other people published as .pth files: tensors only, nothing in them is run, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vqmill.errors import UsageError


def read_weights(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a state dict, by name, on the CPU.

    Args:
        path: the file.
        expected: what it should hold, for errors.

    Raises:
        UsageError: the file is missing, or holds anything but named tensors.
    """
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file; expected {expected}. Nothing is downloaded: put the file there, or name its place."
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and tar files each have errors of their own
        raise UsageError(
            f"{path}: expected {expected}, but no weights can be read from it ({type(error).__name__})."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(f"{path}: expected {expected}, found something other than named tensors.")
    return found


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str, expected: str) -> nn.Module:
    """Puts weights into a module, all of them and no others; it is frozen and in evaluation mode then.

    Raises:
        UsageError: names or shapes differ.
    """
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:200]
        raise UsageError(f"{source}: expected {expected}, found other weights: {first}") from error
    return module.requires_grad_(False).eval()
