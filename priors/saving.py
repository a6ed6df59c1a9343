"""A prior on disk: `prior.safetensors`, its weights with its configuration and the names of its classes in the metadata."""

from __future__ import annotations

from pathlib import Path

from priors.config import PriorConfig
from priors.hierarchy import Prior
from vqmill.checkpoint import build_module, load_checkpoint, save_checkpoint
from vqmill.errors import CodesError
from vqmill.kinds import CHECKPOINT_FILES, checkpoint_file

KIND = "prior"
FILE_NAME = CHECKPOINT_FILES[KIND]


def save(prior: Prior, folder: Path | str) -> Path:
    """Writes a prior into a folder (made if need be, an older prior there is replaced) and returns the file."""
    path = Path(folder) / FILE_NAME
    metadata = {"kind": KIND, "config": prior.config.to_dict(), "fingerprint": prior.fingerprint}
    save_checkpoint(path, prior.state_dict(), metadata | {"class_names": list(prior.class_names)})
    return path


def load(path: Path | str) -> Prior:
    """Reads a prior onto the CPU, in evaluation mode.

    Args:
        path: the folder that `save` wrote into, or the file itself.

    Raises:
        CodesError: the file is missing, damaged, not a prior, or its weights are not those that its fingerprint names.
    """
    file = checkpoint_file(path, KIND)
    tensors, metadata = load_checkpoint(file)
    if metadata.get("kind") != KIND:
        raise CodesError(f"{file}: expected a prior, found a checkpoint of kind {metadata.get('kind')!r}.")
    config = metadata.get("config")
    if not isinstance(config, dict):
        raise CodesError(
            f"{file}: the prior's configuration is missing from the metadata. Restore the file from a copy."
        )
    if "networks" not in config:
        raise CodesError(
            f"{file}: made by an earlier version of vqmill, when all levels had one network's sizes; it cannot be read any more. Train it "
            "again on its store: vqmill train-prior STORE --out DIR"
        )
    try:
        parsed = PriorConfig.from_dict(config)
        names = metadata.get("class_names", [])  # older files have none
        prior = build_module(lambda: Prior(parsed, names), tensors)
    except CodesError as error:
        raise CodesError(f"{file}: {error}") from error
    if prior.fingerprint != metadata.get("fingerprint"):
        raise CodesError(
            f"{file}: expected weights of fingerprint {metadata.get('fingerprint')}, found {prior.fingerprint}. Restore the file from a copy."
        )
    return prior.eval()
