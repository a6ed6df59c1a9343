"""Output folders and files: made beside, renamed when whole, resumed with the same settings, refused with others."""

from __future__ import annotations

import json
import os
import platform
import posixpath
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from vqmill.errors import UsageError
from vqmill.files import PARTIAL_SUFFIX, SETTINGS_FILE, JsonValue, canonical_json, hold_lock, sync_folder, write_whole
from vqmill.places import FileAt, Folder, Where, place_of
from vqmill.settings import refuse_other_settings

RUN_FILE = "run.json"
WORK = "work"
MARGIN_BYTES = 64 * 1024 * 1024  # what a job may need beside its main output: logs, tables, Ray's session


class OutputFolder:
    """The folder a job writes: `folder` is where it works (`OUT.partial`), renamed to `OUT` by `finish`.

    Attributes:
        out: the final place.
        folder: where to write until then.
        finished: the same job has been done before; there is nothing to do.
        resumed: an unfinished run with the same settings was found.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Takes the folder, under a lock.

        Args:
            out: what the user named with --out.
            settings: everything that shapes the result, JSON values; two runs with equal settings are the same job.

        Raises:
            UsageError: the place is taken by something else, or by a run with other settings; the difference is shown.
        """
        place_of(out)  # refuses an address
        self.out = out
        self.folder = out.with_name(out.name + PARTIAL_SUFFIX)
        self._lock = hold_lock(out, "Another job is writing it. Wait for it to end, or choose another --out.")
        try:
            settings = json.loads(canonical_json(settings))
            self.finished = out.exists()
            self.resumed = not self.finished and (self.folder / SETTINGS_FILE).exists()
            if self.finished:
                _compare(out, settings, "Choose another --out, or remove it.")
                self._tidy()  # a kill may have come between the renaming and the tidying
            elif self.resumed:
                _compare(
                    self.folder,
                    settings,
                    "It is an unfinished run. Repeat its settings to resume it, or remove it to start anew.",
                )
            else:
                if self.folder.exists():
                    raise UsageError(
                        f"{self.folder}: exists and is not an unfinished run. Choose another --out, or remove it."
                    )
                write_whole(self.folder / SETTINGS_FILE, canonical_json(settings))
            if not self.finished:  # whoever finds it unfinished looks there for the command that goes on with it
                write_whole(self.folder / RUN_FILE, canonical_json({"started": _now(), **_typed()}))
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    @property
    def work(self) -> Path:
        """A folder inside for what only an unfinished run needs, such as resume points; `finish` removes it."""
        path = self.folder / WORK
        path.mkdir(exist_ok=True)
        return path

    def finish(self) -> None:
        """Renames the folder to its final place, then removes what only an unfinished run needs."""
        self.folder.rename(self.out)
        sync_folder(self.out.parent)
        self._tidy()

    def _tidy(self) -> None:
        work = self.out / WORK
        if work.exists():
            shutil.rmtree(work)


def _compare(folder: Path, wanted: Mapping[str, Any], advice: str) -> None:
    path = folder / SETTINGS_FILE
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    if not path.is_file() or found.get("command") != wanted.get(
        "command"
    ):  # nobody should remove it for this command's sake
        other = f" but of {found['command']}" if "command" in found else ""
        raise UsageError(f"{folder}: exists and is not the output of this command{other}. Choose another --out.")
    refuse_other_settings(str(folder), found, wanted, advice)


def refuse_inside(out: Path | str, source: str, kind: str = "corpus") -> None:
    """Refuses to write into the folder that is being read, a corpus or a store, where the output would become part of it.

    Raises:
        UsageError: `out` lies in it.
    """
    if lies_in(out, source) and ("://" in source or Path(source).is_dir()):
        raise UsageError(
            f"--out {out}: lies inside the {kind} {source}, and would be read as a part of it. Choose a place outside."
        )


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings with which an output was made, or begun; nothing where there is none."""
    for folder in (out, out.with_name(out.name + PARTIAL_SUFFIX)):
        if (folder / SETTINGS_FILE).is_file():
            return json.loads((folder / SETTINGS_FILE).read_bytes())
    return {}


def lies_in(inner: Path | str, outer: Path | str) -> bool:
    """Whether the first of two paths or addresses is, or lies in, the second, however they are spelled."""
    return f"{_spelled_out(inner)}/".startswith(_spelled_out(outer).rstrip("/") + "/")


def _spelled_out(place: Path | str) -> str:
    """A path without links, or an address as an object store understands it."""
    if "://" not in str(place):
        return str(Path(place).resolve())
    parts = urlsplit(str(place))
    if parts.scheme == "file":
        return str(Path(url2pathname(parts.path)).resolve())
    return f"{parts.scheme}://{parts.netloc}{posixpath.normpath(unquote(parts.path) or '/')}"


def require_room(path: Where, needed_bytes: int) -> None:
    """Refuses to start a job whose output will not fit on its disk; an object store tells nobody how much room it has.

    Args:
        path: where the output goes; it need not exist yet.
        needed_bytes: an upper estimate.

    Raises:
        UsageError: less is free.
    """
    target = place_of(path)
    if not isinstance(target, Folder):
        return
    place = target.path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes + MARGIN_BYTES:
        raise UsageError(
            f"{target.name}: the output may take {needed_bytes / 1e6:,.0f} MB (plus {MARGIN_BYTES / 1e6:.0f} MB to spare), "
            f"but only {free / 1e6:,.0f} MB are free there. Free some room, or choose an --out on another disk."
        )


def disk_bytes(where: Where) -> int:
    """What the files below a folder or an address hold, bytes."""
    return sum(place_of(where).list().values())


def run_record(**facts: Any) -> dict[str, Any]:
    """What is written beside every output: when, with which versions, from which commit, and the caller's facts."""
    packages = ("vqmill", "torch", "torchvision", "zarr", "numcodecs", "ray", "pyarrow", "pillow", "numpy")
    return {
        "finished": _now(),
        **_typed(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {package: version(package) for package in packages},
        "git_commit": _git_commit(),
        **facts,
    }


def recorded_command(record: Path | FileAt, out: Path | str, untrained: Sequence[str] = ()) -> str | None:
    """The command that made an output, ready to be pasted, as its record says; None when there is no such record.

    Args:
        record: what `run_record` gave, or what an unfinished output has in its place.
        out: where the output is now.
        untrained: levels that are still to be trained; a command for another level becomes one for the first of them, or for `all`.
    """
    try:
        found: JsonValue = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # the advice then names the command in words
    words: JsonValue = found.get("command") if isinstance(found, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    folder = found.get("folder") if isinstance(found, dict) else None
    elsewhere = isinstance(folder, str) and folder != str(Path.cwd())
    here = out if "://" in str(out) or not elsewhere else Path(out).absolute()
    command = shlex.join(_with_level(_with_out(list(map(str, words)), here), untrained))
    return f"cd {shlex.quote(str(folder))} && {command}" if elsewhere else command


def _with_out(words: list[str], out: Path | str) -> list[str]:
    """A recorded command, for the output at the place where it is now, and for people to read."""
    words = [word for word in words if word != "--json"]
    if "demo" in words[1:2]:  # its --out holds several outputs
        return words
    flag = "--codes" if "sample" in words[1:2] else "--out"  # the store; its --out is the picture
    for place, word in enumerate(words):
        if word == flag and place + 1 < len(words):
            words[place + 1] = str(out)
        elif word.startswith(f"{flag}="):
            words[place] = f"{flag}={out}"
    return words


def _with_level(words: list[str], untrained: Sequence[str]) -> list[str]:
    """A recorded command whose level, if it has one and that is trained, is one that is not."""
    if "--level" in words[:-1]:
        place = words.index("--level")
        words = [*words[:place], f"--level={words[place + 1]}", *words[place + 2 :]]
    others = ("--level=all", *(f"--level={name}" for name in untrained))
    return [
        f"--level={untrained[0]}" if untrained and word.startswith("--level=") and word not in others else word
        for word in words
    ]


def _typed() -> dict[str, Any]:
    """What was typed, and where."""
    return {"command": ["vqmill", *sys.argv[1:]], "folder": str(Path.cwd())}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the source tree we run from; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or None
