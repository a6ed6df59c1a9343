"""A prefix of an object store: S3 and its like, through obstore.

An object appears whole or not at all, and who asks after a put has ended gets what was put: no renaming is needed, and no syncing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np

from vqmill.errors import UsageError
from vqmill.places import Bytes, Hold, OpenFile, Readable

REQUEST_SECONDS = 120  # for one Zarr shard over a slow line
GAP_BYTES = 64 * 1024  # so much that nobody wants is fetched rather than asked around
RETRY: dict[str, Any] = {}  # obstore's own: ten times, three minutes at most
Version = dict[str, str]  # what names one state of an object: its e_tag, and its version where there are such
Answer = TypeVar("Answer")


class ConflictError(Exception):
    """An object is not, or no longer, what it must be to be replaced."""


class Bucket:
    """A prefix of an object store: `s3://`, `gs://`, `az://`, `https://`. One request for each range that is read, or object written."""

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
        self._obstore: Any = obstore
        self.name = url.rstrip("/")
        self.base = parts.path.rstrip("/").rpartition("/")[2]
        options: dict[str, Any] = {"timeout": f"{REQUEST_SECONDS}s"}
        if os.environ.get("AWS_ENDPOINT_URL", url).startswith("http://"):
            options["allow_http"] = True
        try:
            self.store: Any = obstore.store.from_url(self.name, client_options=options, retry_config=RETRY)  # pyright: ignore
        except Exception as error:  # obstore's errors have no base class in common
            raise UsageError(
                f"{self.name}: not an address that can be read: {_said(error)} Expected s3://, gs://, az:// or https://."
            ) from None

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.name,)

    def __repr__(self) -> str:
        return f"Bucket({self.name!r})"

    def open(self, file: str) -> OpenFile:
        """See `Place`."""
        return _RemoteFile(self, file)

    def head(self, file: str) -> int:
        """Size of a file, bytes."""
        return self._asked(lambda: int(self._obstore.head(self.store, file)["size"]))

    def get_range(self, file: str, start: int, length: int) -> Any:
        """Bytes of a file, as a buffer."""
        return self._asked(lambda: self._obstore.get_range(self.store, file, start=start, length=length))

    def get_ranges(self, file: str, starts: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        """Several ranges of a file, as buffers."""
        return self._asked(
            lambda: self._obstore.get_ranges(
                self.store, file, starts=list(starts), lengths=list(sizes), coalesce=GAP_BYTES
            )
        )

    def get(self, file: str) -> tuple[bytes, Version]:
        """A whole file, and which state of it this is.

        Raises:
            OSError: it is not there, or cannot be had.
        """

        def request() -> tuple[bytes, Version]:
            found = self._obstore.get(self.store, file)
            return bytes(found.bytes()), _version(found.meta)

        return self._asked(request)

    def put(self, file: str, data: bytes, known: Version | Literal["create"] | None = None) -> Version:
        """Writes an object in one request.

        Args:
            file: its name.
            data: its content.
            known: write only if the object is still in this state; `create`, only if there is none; None, in any case.

        Raises:
            ConflictError: it is in another state.
            OSError: it cannot be written.
            UsageError: the object store knows no such conditions.
        """
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        mode: Any = "overwrite" if known is None else known
        try:
            return _version(self._obstore.put(self.store, file, data, mode=mode, use_multipart=False))
        except (AlreadyExistsError, PreconditionError) as error:
            raise ConflictError(_said(error)) from None
        except (NotSupportedError, NotImplementedError) as error:
            raise UsageError(f"{self.name}/{file}: {NO_CONDITIONS} ({_said(error)})") from None
        except FileNotFoundError as error:
            if isinstance(known, dict) and "NoSuchBucket" not in str(error):
                raise ConflictError("no such object") from None
            raise OSError(f"{self.name}/{file}: cannot be written: {_said(error)}") from None
        except Exception as error:  # obstore's errors have no base class in common
            raise OSError(f"{self.name}/{file}: cannot be written: {_said(error)}") from None

    def list(self) -> dict[str, int]:
        """See `Place`."""

        def request() -> dict[str, int]:
            return {
                meta["path"]: int(meta["size"])
                for batch in self._obstore.list(self.store, chunk_size=1000)
                for meta in batch
            }

        try:
            return dict(sorted(self._asked(request).items()))
        except OSError as error:
            raise OSError(f"{self.name}: cannot be listed: {error}") from None

    def write(self, file: str, data: bytes) -> None:
        """See `Place`."""
        self.put(file, data)

    def delete(self, files: Iterable[str]) -> None:
        """See `Place`."""
        names = list(files)
        try:
            if names:
                self._asked(lambda: self._obstore.delete(self.store, names))
        except FileNotFoundError:  # one of many on some servers: then one by one
            if len(names) > 1:
                for name in names:
                    self.delete([name])
        except OSError as error:
            raise OSError(f"{self.name}: {names[0]} and {len(names) - 1:,} more cannot be removed: {error}") from None

    def hold(self, advice: str, guarded: str) -> Hold:
        """See `Place`: a lease."""
        from vqmill.lease import Lease

        return Lease(self, advice, guarded)

    def beside(self) -> Bucket:
        """See `Place`.

        Raises:
            UsageError: this is a whole bucket.
        """
        if not self.base:
            raise UsageError(f"{self.name}: a whole bucket. Give the store a name in it: {self.name}/codes.zarr")
        return Bucket(self.name.removesuffix(f"/{self.base}"))

    def fetched(self) -> Readable:
        """See `Place`."""
        return _Fetched(self)

    def is_link(self, file: str) -> bool:
        """See `Place`: there are none."""
        return False

    def is_blocked(self, file: str) -> bool:
        """See `Place`: names do not stand in each other's way."""
        return False

    def _asked(self, request: Callable[[], Answer]) -> Answer:
        try:
            return request()
        except FileNotFoundError:
            raise FileNotFoundError("no such object") from None
        except Exception as error:  # obstore's errors have no base class in common
            raise OSError(_said(error)) from None


class _Fetched:
    def __init__(self, bucket: Bucket) -> None:
        self.name = bucket.name
        self._bucket = bucket
        self._files: dict[str, OpenFile] = {}

    def open(self, file: str) -> OpenFile:
        """See `Place.fetched`."""
        if file not in self._files:
            self._files[file] = _MemoryFile(self._bucket.get(file)[0])
        return self._files[file]


class _MemoryFile:
    descriptor: int | None = None

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self.size = len(data)

    def read_into(self, start: int, buffer: Bytes) -> int:
        """See `OpenFile`."""
        data = self._data[start : start + len(buffer)]
        buffer[: len(data)] = data
        return len(data)


NO_CONDITIONS = (
    "this object store does not write on conditions, so that two jobs could not be kept apart. Use one that does (S3, and servers that "
    "know If-None-Match and If-Match), or write to a disk and copy the store"
)


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

    def read_parts(self, starts: Sequence[int], sizes: Sequence[int]) -> list[Bytes]:
        """See `RemoteFile`: neighbours come in one request, others side by side."""
        parts = self._bucket.get_ranges(self._file, starts, sizes)
        return [np.frombuffer(part, np.uint8) for part in parts]


def _version(facts: Mapping[str, Any]) -> Version:
    return {key: facts[key] for key in ("e_tag", "version") if facts.get(key) is not None}


def _said(error: Exception) -> str:
    """The first line of an error: no headers, no queries of addresses, for these may be signed."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"(https?://[^\s?)\"']*)\?[^\s)\"']*", r"\1", first)
