"""Where a store's files are read from: a folder of this machine, or an object store (S3 and its like, through obstore).

Names of files are those of docs/format.md. Symbolic links inside a store are not followed; credentials come from the environment and are in
no message.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from vqmill.errors import CodesError, UsageError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


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


class Place(Protocol):
    """A folder or a prefix with a store's files in it."""

    name: str  # for messages

    def open(self, file: str) -> OpenFile:
        """Opens a file.

        Raises:
            OSError: it is not there, or cannot be had.
            CodesError: it is a link, or no plain file.
        """
        ...


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._root = os.path.realpath(path)

    def open(self, file: str) -> OpenFile:
        """See `Place`."""
        path = os.path.join(self._root, file)
        if os.path.realpath(path) != path:
            raise CodesError(
                "it is, or lies behind, a symbolic link; only plain files of the store are read. Copy it with its links resolved (cp -rL)"
            )
        return _LocalFile(path)


class _LocalFile:
    """Closed when the last one who reads from it lets go. A file that a writer replaces meanwhile stays readable."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
        self._file = os.fdopen(descriptor, "rb", buffering=0)  # an object that closes itself, and refuses to be copied
        self.descriptor: int | None = descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CodesError("not a plain file")
        self.size = found.st_size

    def read_into(self, start: int, buffer: Bytes) -> int:
        """See `OpenFile`."""
        return os.preadv(self._file.fileno(), [buffer.data], start)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class Bucket:
    """A prefix of an object store: `s3://`, `gs://`, `az://`, `https://`. One request for each range that is read."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet; region, endpoint and credentials are those of the environment (AWS_REGION, AWS_ENDPOINT, ...).

        Raises:
            UsageError: obstore is not installed, or the address is not one.
        """
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UsageError(
                f"{parts.scheme}://{parts.hostname}{parts.path}: an address holds no credentials and no query. Put credentials into the "
                "environment (AWS_ACCESS_KEY_ID and so on)."
            )
        try:
            import obstore
        except ImportError as error:
            raise UsageError(f"{url}: object stores need obstore. Install it with: pip install 'vqmill[s3]'") from error
        self._obstore = obstore
        self.name = url
        options: dict[str, Any] = (
            {"allow_http": True} if os.environ.get("AWS_ENDPOINT_URL", url).startswith("http://") else {}
        )
        try:
            self.store: Any = obstore.store.from_url(url, client_options=options)  # pyright: ignore
        except Exception as error:  # obstore's errors have no base class in common
            raise UsageError(f"{self.name}: not an address that can be read: {_first_line(error)}") from error

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.name,)

    def open(self, file: str) -> OpenFile:
        """See `Place`."""
        return _RemoteFile(self, file)

    def head(self, file: str) -> int:
        """Size of a file, bytes."""
        return self._asked(lambda: int(self._obstore.head(self.store, file)["size"]))

    def get_range(self, file: str, start: int, length: int) -> Any:
        """Bytes of a file, as a buffer."""
        return self._asked(lambda: self._obstore.get_range(self.store, file, start=start, length=length))

    def _asked(self, request: Any) -> Any:
        try:
            return request()
        except FileNotFoundError as error:
            raise FileNotFoundError("no such object") from error
        except Exception as error:  # obstore's errors have no base class in common
            raise OSError(_first_line(error)) from error


class _RemoteFile:
    descriptor: int | None = None

    def __init__(self, bucket: Bucket, file: str) -> None:
        self._bucket, self._file = bucket, file
        self.size = bucket.head(file)

    def read_into(self, start: int, buffer: Bytes) -> int:
        """See `OpenFile`."""
        if not len(buffer):
            return 0
        data = np.frombuffer(self._bucket.get_range(self._file, start, len(buffer)), np.uint8)
        buffer[: len(data)] = data
        return len(data)


def place_of(path: str | os.PathLike[str]) -> Place:
    """A folder, or what a URL names.

    Raises:
        UsageError: an address that cannot be read.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return Folder(Path(url2pathname(urlsplit(text).path)))
    return Bucket(text) if "://" in text else Folder(Path(text))


def read_file(place: Place, file: str, max_bytes: int) -> bytes:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
