"""Checkpoints: one safetensors file with its configuration in the metadata. Nothing in it can run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vqmill.errors import CodesError, UsageError
from vqmill.files import JsonValue, canonical_json, write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

METADATA_KEY = "vqmill"
Module = TypeVar("Module", bound="nn.Module")


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON description into one file, beside its place and then renamed.

    Args:
        path: the `.safetensors` file.
        tensors: by name, any device; stored as they are, contiguous.
        metadata: JSON values only; kept as canonical JSON under the key `vqmill`.
    """
    write_whole(path, dump_checkpoint(tensors, metadata))


def dump_checkpoint(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint file, for those who ship it over a network rather than through a disk."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(whole, metadata={METADATA_KEY: canonical_json(metadata).decode()})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint file onto the CPU.

    Returns:
        The tensors by name, and the description that was saved with them.

    Raises:
        CodesError: the file is missing, cut short, not safetensors, or not written by vqmill.
    """
    if not path.is_file():
        raise UsageError(
            f"{path}: no such checkpoint file. Name the folder or file that a train command wrote with --out."
        )
    return parse_checkpoint(path.read_bytes(), str(path))


def parse_checkpoint(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint from its bytes; `source` names it in errors. See `load_checkpoint`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has not
        raise _not_whole(source, error) from error
    return tensors, _description(data[8 : 8 + int.from_bytes(data[:8], "little")], source)


def read_description(path: Path) -> dict[str, Any]:
    """The description that was saved with a checkpoint's tensors, which are not read.

    Raises:
        CodesError: as `load_checkpoint`.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _description(file.read(min(length, path.stat().st_size)), str(path))


def _description(header: bytes, source: str) -> dict[str, Any]:
    try:
        found: JsonValue = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _not_whole(source, error) from error
    entries: JsonValue = found.get("__metadata__") if isinstance(found, dict) else None
    text: JsonValue = entries.get(METADATA_KEY) if isinstance(entries, dict) else None
    if not isinstance(text, str):
        raise CodesError(
            f"{source}: a safetensors file, but not one of vqmill's (no '{METADATA_KEY}' in its metadata)."
        )
    try:
        metadata: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodesError(f"{source}: its '{METADATA_KEY}' metadata is not JSON ({error}).") from error
    if not isinstance(metadata, dict):
        raise CodesError(f"{source}: its '{METADATA_KEY}' metadata is {type(metadata).__name__}, expected an object.")
    return metadata


def _not_whole(source: str, error: Exception) -> CodesError:
    return CodesError(f"{source}: not a whole safetensors file ({error}). Restore it from a copy, or train again.")


def build_module(build: Callable[[], Module], tensors: Mapping[str, Tensor]) -> Module:
    """The network of a checkpoint file that may be anybody's.

    Names, dtypes and shapes are compared before anything is allocated or drawn, so a file's configuration can demand no more memory
    than the file's own tensors take. torch's generators stay as they are.

    Args:
        build: makes the network from the file's configuration; it runs on torch's `meta` device.
        tensors: what `load_checkpoint` gave; the network keeps them as they are, without a copy.

    Raises:
        CodesError: the tensors are not exactly those of the network; the first that differs is named.
    """
    import torch

    with torch.device("meta"):  # shapes only
        module = build()
    expected, found = _shapes(module.state_dict()), _shapes(tensors)
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise CodesError(
            f"the weights do not fit the configuration: {len(wrong)} differ, first '{name}': expected {expected.get(name, 'nothing')}, "
            f"found {found.get(name, 'nothing')}."
        )
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def fingerprint(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """A name for exactly these weights with exactly this configuration: 32 hex digits of a SHA-256.

    Depends on names, dtypes, shapes, values and the configuration; not on device, order or file.
    """
    import torch

    digest = hashlib.sha256(canonical_json(config))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
