"""Tokenizers on disk: one safetensors file with the configuration in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizer.config import TokenizerConfig
from tokenizer.models import Tokenizer
from vqmill.checkpoint import (
    build_module,
    dump_checkpoint,
    fingerprint,
    load_checkpoint,
    parse_checkpoint,
    save_checkpoint,
)
from vqmill.errors import CodesError
from vqmill.kinds import CHECKPOINT_FILES, checkpoint_file

KIND = "tokenizer"
FILE_NAME = CHECKPOINT_FILES[KIND]


def dumps(model: Tokenizer) -> bytes:
    """The bytes of a checkpoint file, to be sent rather than stored."""
    return dump_checkpoint(model.state_dict(), _metadata(model))


def loads(data: bytes, source: str = "tokenizer") -> Tokenizer:
    """Reads what `dumps` gave; `source` names it in errors. See `load`."""
    return _checked(*parse_checkpoint(data, source), source)


def save(model: Tokenizer, folder: str | Path) -> Path:
    """Writes `tokenizer.safetensors` into a folder, whole or not at all.

    Returns:
        The file's path.
    """
    path = Path(folder) / FILE_NAME
    save_checkpoint(path, model.state_dict(), _metadata(model))
    return path


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer onto the CPU, in evaluation mode.

    Args:
        path: the file that `save` wrote, or the folder that holds it.

    Raises:
        CodesError: missing, damaged, not a tokenizer, or its weights do not fit its configuration.
    """
    file = checkpoint_file(path, KIND)
    return _checked(*load_checkpoint(file), str(file))


def _metadata(model: Tokenizer) -> dict[str, Any]:
    return {"kind": KIND, "config": model.config.to_dict(), "fingerprint": model.fingerprint}


def _checked(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: str) -> Tokenizer:
    config = metadata.get("config")
    if metadata.get("kind") != KIND or not isinstance(config, Mapping):
        raise CodesError(f"{path}: expected a tokenizer, found {metadata.get('kind')!r}.")
    try:
        parsed = TokenizerConfig.from_dict(config)
        model = build_module(lambda: Tokenizer(parsed), tensors)
    except CodesError as error:
        raise CodesError(f"{path}: {error}") from error
    found = fingerprint(tensors, config)
    if found != metadata.get("fingerprint"):
        raise CodesError(
            f"{path}: its weights have fingerprint {found}, but {metadata.get('fingerprint')} was written with them. "
            "The file was changed after it was saved; restore it from a copy."
        )
    return model.eval()
