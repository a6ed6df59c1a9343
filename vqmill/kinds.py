"""What a place holds: which of vqmill's outputs, told by its files; and what to say where something else was expected."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Literal

from vqmill.errors import UsageError
from vqmill.files import PARTIAL_SUFFIX, SETTINGS_FILE, JsonValue

Kind = Literal["store", "zarr", "tokenizer", "prior", "evaluation", "scores", "unfinished"]
STORE_FILE = "zarr.json"
MAX_BYTES = 16 * 1024 * 1024  # of a JSON file that is looked into
CHECKPOINT_FILES: dict[Literal["tokenizer", "prior"], str] = {
    "tokenizer": "tokenizer.safetensors",
    "prior": "prior.safetensors",
}
_OF_COMMAND: dict[JsonValue, Kind] = {"evaluate": "evaluation", "score": "scores"}
_WORDS: dict[Kind, str] = {
    "store": "a code store",
    "zarr": "a Zarr array or group that is no code store",
    "tokenizer": "a tokenizer",
    "prior": "a prior",
    "evaluation": "an evaluation of a tokenizer",
    "scores": "the scores of a store's rows",
}
_EXPECTED = {
    "store": "the folder that `vqmill tokenize` wrote",
    "tokenizer": "the folder that `vqmill train-tokenizer` or `vqmill import-checkpoint` wrote",
    "prior": "the folder that `vqmill train-prior` wrote",
}


def kind_of(path: Path) -> Kind | None:
    """What a place holds, as its files say; whether they are whole is not looked at. None for what is not ours.

    Args:
        path: a folder, or the file of a tokenizer or prior itself.
    """
    if path.name.endswith(PARTIAL_SUFFIX) and (path / SETTINGS_FILE).is_file():
        return "unfinished"
    if (path / STORE_FILE).is_file():
        return "store" if b'"vqmill"' in _beginning(path / STORE_FILE) else "zarr"
    for kind, name in CHECKPOINT_FILES.items():
        if (path / name).is_file() or (path.name == name and path.is_file()):
            return kind
    return _OF_COMMAND.get(command_of(path))


def command_of(folder: Path) -> str | None:
    """The command whose output, finished or not, a folder is, as the settings in it say; None where they do not."""
    try:
        settings: JsonValue = json.loads(_beginning(folder / SETTINGS_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    command = settings.get("command") if isinstance(settings, dict) else None
    return command if isinstance(command, str) else None


def _beginning(file: Path) -> bytes:
    """All of a file that may be ours: ours are small, others' are not to be held in memory."""
    with file.open("rb") as opened:
        return opened.read(MAX_BYTES)


def unfinished_of(out: Path) -> Path | None:
    """The unfinished run beside an output that is not there yet; None where there is none, or the output is there."""
    if out.exists() or not out.name:
        return None
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    return partial if kind_of(partial) else None


def held_by(path: Path) -> str:
    """What a place that is there holds, in words: `it holds a prior`."""
    kind = kind_of(path)
    if kind == "unfinished":
        return f"it holds an unfinished run of {command_of(path) or 'a command'}; see: vqmill inspect {shlex.quote(str(path))}"
    if kind:
        return f"it {'holds' if path.is_dir() else 'is'} {_WORDS[kind]}"
    return "nothing in it is an output of vqmill's" if path.is_dir() else "it is a file that vqmill did not write"


def wrong_place(path: Path, expected: Literal["store", "tokenizer", "prior"]) -> UsageError:
    """The error to raise where a place does not hold what was expected.

    >>> str(wrong_place(Path("nowhere"), "prior"))
    'nowhere: no such prior. Expected the folder that `vqmill train-prior` wrote.'
    """
    noun = _WORDS[expected].removeprefix("a ")
    if path.exists():
        found = f"not a {noun}: {held_by(path)}"
    elif partial := unfinished_of(path):
        found = f"no such {noun}, but {partial} {held_by(partial).removeprefix('it ')}"
    else:
        found = f"no such {noun}"
    return UsageError(f"{path}: {found}. Expected {_EXPECTED[expected]}.")


def checkpoint_file(path: Path | str, kind: Literal["tokenizer", "prior"]) -> Path:
    """The file of a tokenizer or prior, of which the file or its folder was named.

    Raises:
        UsageError: it is not there; the error says what is.
    """
    path = Path(path)
    file = path / CHECKPOINT_FILES[kind] if path.is_dir() else path
    if not file.is_file() or kind_of(file) not in (kind, None):
        raise wrong_place(path, kind)
    return file
