"""Where a store lies: a folder of this machine, or a prefix of an object store (bucket.py).

Names of files are those of docs/format.md. Symbolic links inside a store are not followed; credentials come from the environment and are in
no message.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from vqmill.errors import CodesError, UsageError
from vqmill.files import hold_lock, sync_folder, write_whole

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
MAX_RECORD_BYTES = 16 * 1024 * 1024


class OpenFile(Protocol):
    """A file that stays readable as it was when it was opened, on a disk; in an object store, files are taken not to change."""

    size: int
    descriptor: int | None  # while this object lives; None: no file of this machine

    def read_into(self, start: int, buffer: Bytes) -> int:
        """Fills the buffer with the bytes from `start` on; returns how many there were.

        Raises:
            OSError: they cannot be had.
        """
        ...


@runtime_checkable
class RemoteFile(OpenFile, Protocol):
    """A file each read of which is a request, so that many parts are better asked for together."""

    def read_parts(self, starts: Sequence[int], sizes: Sequence[int]) -> list[Bytes]:
        """Parts of the file, uint8 [size] each.

        Raises:
            OSError: they cannot be had.
        """
        ...


class Hold(Protocol):
    """The right to write a place, of one job at a time. On a disk it ends with its process; in an object store it is a lease."""

    def check(self) -> None:
        """Asks before something is made to count whether the right is still ours.

        Raises:
            CodesError: another job has taken the place over.
            OSError: the object store does not answer.
        """
        ...

    def create(self, files: Mapping[str, bytes], last: bytes) -> None:
        """Makes the place: some files, and the one that `publish` writes. Nobody sees that one without the others.

        Raises:
            UsageError: something else is there.
            CodesError: another job has taken the place over.
            OSError: it cannot be written.
        """
        ...

    def publish(self, data: bytes) -> None:
        """Writes the one file whose replacing makes everything else count, if the right is still ours.

        Raises:
            CodesError: another job has taken the place over; nothing was written.
            OSError: it cannot be written.
        """
        ...

    def close(self) -> None:
        """Gives the right back; a second time is harmless."""
        ...


class Readable(Protocol):
    """What a store's files can be read from."""

    name: str  # for messages

    def open(self, file: str) -> OpenFile:
        """Opens a file.

        Raises:
            OSError: it is not there, or cannot be had.
            CodesError: it is a link, or no plain file.
        """
        ...


class Place(Readable, Protocol):
    """A folder or a prefix with a store's files in it."""

    base: str  # the last part of the name

    def list(self) -> dict[str, int]:
        """Every file, links too, with its size in bytes; empty where there is nothing.

        Raises:
            OSError: they cannot be had.
        """
        ...

    def write(self, file: str, data: bytes) -> None:
        """Writes a file, durable, whole or not at all; one that is there is replaced.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def delete(self, files: Iterable[str]) -> None:
        """Removes files, durably; those that are not there are no error.

        Raises:
            OSError: it cannot be done.
        """
        ...

    def hold(self, advice: str, guarded: str) -> Hold:
        """Takes the right to write this place.

        Args:
            advice: what the user can do when another job has it.
            guarded: the file that `Hold.publish` writes.

        Raises:
            UsageError: another job has it, or none can have it here.
        """
        ...

    def beside(self) -> Place:
        """The place that this one lies in."""
        ...

    def fetched(self) -> Readable:
        """The same files for one who reads a few files whole and more than once: each is fetched once, and kept as long as this object."""
        ...

    def is_link(self, file: str) -> bool:
        """Whether a file is a symbolic link."""
        ...

    def is_blocked(self, file: str) -> bool:
        """Whether a folder is where a file belongs, or a file where its folder belongs."""
        ...


Where = str | os.PathLike[str] | Place


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.base = path.name
        self._root = os.path.realpath(path)

    def __reduce__(self) -> tuple[type[Folder], tuple[Path]]:
        return Folder, (self.path.absolute(),)  # another process may work in another folder

    def open(self, file: str) -> OpenFile:
        """See `Place`."""
        path = os.path.join(self._root, file)
        if os.path.realpath(path) != path:
            raise CodesError(
                "it is, or lies behind, a symbolic link; only plain files of the store are read. Copy it with its links resolved (cp -rL)"
            )
        return _LocalFile(path)

    def list(self) -> dict[str, int]:
        """See `Place`."""
        files = [path for path in sorted(self.path.rglob("*")) if path.is_symlink() or not path.is_dir()]
        return {path.relative_to(self.path).as_posix(): path.lstat().st_size for path in files}

    def write(self, file: str, data: bytes) -> None:
        """See `Place`."""
        write_whole(self.path / file, data)

    def delete(self, files: Iterable[str]) -> None:
        """See `Place`."""
        paths = [self.path / file for file in files]
        for path in paths:
            path.unlink(missing_ok=True)  # an orphan may rename its half-written file under our hands
        for folder in sorted({path.parent for path in paths if path.parent.is_dir()}):
            sync_folder(folder)

    def hold(self, advice: str, guarded: str) -> Hold:
        """See `Place`: a lock of the kernel."""
        return _Lock(self, guarded, hold_lock(self.path, advice))

    def beside(self) -> Folder:
        """See `Place`."""
        return Folder(self.path.parent)

    def fetched(self) -> Readable:
        """See `Place`: the kernel keeps what is read."""
        return self

    def is_link(self, file: str) -> bool:
        """See `Place`."""
        return (self.path / file).is_symlink()

    def is_blocked(self, file: str) -> bool:
        """See `Place`."""
        path = self.path / file
        return path.is_dir() or any(above.is_file() for above in path.parents)


class _Lock:
    def __init__(self, folder: Folder, guarded: str, descriptor: int) -> None:
        self._folder, self._guarded = folder, guarded
        self._descriptor: int | None = descriptor

    def check(self) -> None:
        """See `Hold`: the kernel gives it to nobody else while this process lives."""

    def create(self, files: Mapping[str, bytes], last: bytes) -> None:
        """See `Hold`: made beside, and renamed."""
        path = self._folder.path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path}: exists and is not a code store. Choose another --out, or remove it.")
        beside = path.with_name(f".{path.name}.new")  # a name that only we use, as that of the lock
        if beside.exists():
            shutil.rmtree(beside)  # left by a killed job: the lock is held, and a store is renamed before its first row
        for name, data in {**files, self._guarded: last}.items():
            write_whole(beside / name, data)
        beside.rename(path)
        sync_folder(path.parent)

    def publish(self, data: bytes) -> None:
        """See `Hold`."""
        self._folder.write(self._guarded, data)

    def close(self) -> None:
        """See `Hold`."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _LocalFile:
    """Closed when the last one who reads from it lets go. A file that a writer replaces meanwhile stays readable."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise CodesError("not a plain file")
        self._file = os.fdopen(descriptor, "rb", buffering=0)  # an object that closes itself, and refuses to be copied
        self.descriptor: int | None = descriptor
        self.size = found.st_size

    def read_into(self, start: int, buffer: Bytes) -> int:
        """See `OpenFile`."""
        return os.preadv(self._file.fileno(), [buffer.data], start)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def place_of(where: Where) -> Place:
    """A folder, or what a URL names.

    Raises:
        UsageError: an address that cannot be read.
    """
    if not isinstance(where, (str, os.PathLike)):
        return where
    text = os.fspath(where)
    if text.startswith("file://"):
        return Folder(Path(url2pathname(urlsplit(text).path)))
    if re.match(r"(s3|gs|az|https?):/(?!/)", text):
        raise UsageError(
            f"{text}: an address of an object store that was taken for a path. Only code stores are read and written there, and in Python an "
            "address is a string, no Path."
        )
    if "://" not in text:
        return Folder(Path(text))
    from vqmill.bucket import Bucket  # which imports this module

    return Bucket(text)


def read_file(place: Readable, file: str, max_bytes: int) -> bytes:
    """A whole file.

    Raises:
        OSError: it is not there, or cannot be had.
        CodesError: larger than that, a link, or no plain file.
    """
    opened = place.open(file)
    if opened.size > max_bytes:
        raise CodesError(f"{opened.size:,} bytes, expected at most {max_bytes:,}")
    buffer = np.empty(opened.size, np.uint8)
    done = opened.read_into(0, buffer)
    if done != opened.size:
        raise OSError(f"it ends after {done:,} of {opened.size:,} bytes")
    return buffer.tobytes()


@dataclass(frozen=True)
class FileAt:
    """A small file at a place, for example the record beside a store."""

    place: Place
    file: str

    def __str__(self) -> str:
        return f"{self.place.name}/{self.file}"

    def read_bytes(self) -> bytes:
        """What it holds.

        Raises:
            OSError: it is not there, or cannot be had.
        """
        try:
            return read_file(self.place, self.file, MAX_RECORD_BYTES)
        except CodesError as error:
            raise OSError(str(error)) from error

    def exists(self) -> bool:
        """Whether there is such a file.

        Raises:
            OSError: this cannot be found out.
        """
        try:
            self.place.open(self.file)
        except FileNotFoundError:
            return False
        except CodesError:  # something is
            pass
        return True

    def write(self, data: bytes) -> None:
        """Writes it whole."""
        self.place.write(self.file, data)
