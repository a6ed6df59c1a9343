"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqmill.errors import UsageError

PARTIAL_SUFFIX = ".partial"
SETTINGS_FILE = "settings.json"  # of an output folder: the command, and all that shapes what it makes
JsonValue = dict[str, Any] | list[Any] | str | float | bool | None  # what json.loads gives


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and fixed separators: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the SHA-256 of all else that it says, so that a changed byte is found."""
    content = {key: item for key, item in value.items() if key != "sha256"}
    return {**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}


def sync_folder(folder: Path) -> None:
    """Makes the names inside a folder durable (fsync of the folder itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each durable: a file in a folder that a power cut takes away is lost with it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place, makes it durable, and renames it: readers see the old file or the new one, never a part.

    Args:
        path: the final place; missing folders are made.
        data: the whole content.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        make_folder(path.parent)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # a full disk names no file, others the one beside
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def hold_lock(path: Path, advice: str) -> int:
    """Takes the lock of an output until the returned descriptor is closed or the process ends, however it ends.

    Args:
        path: the output; the lock is the file `.NAME.lock` beside it, which stays.
        advice: what the user can do when it is taken.

    Raises:
        UsageError: another process holds it.
    """
    real = path.resolve()  # whatever link it is called by
    make_folder(real.parent)
    descriptor = os.open(real.with_name(f".{real.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UsageError(f"{path}: locked. {advice}") from error
    return descriptor
