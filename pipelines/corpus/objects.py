"""Objects of a bucket, to be read: listed, whole, and in parts with read-ahead. All questions to object stores are asked here.

Region, endpoint and credentials are those of the environment. What a server answers is given in words of ours, for its own may hold signed
addresses and key ids, and the time it took.
"""

from __future__ import annotations

import io
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from threading import Lock
from typing import Any, BinaryIO, TypeVar, cast

from pipelines.corpus.folder import FoundFile
from pipelines.corpus.gunzip import gunzip
from pipelines.corpus.names import is_gzip_tar
from pipelines.corpus.problems import CorpusError
from pipelines.errors import RunFailed
from vqmill.errors import UsageError
from vqmill.places import place_of

PART_BYTES = 4 << 20  # of one request; larger ones are hardly faster
PARTS_AHEAD = 3  # asked for before they are needed
PARTS_KEPT = (
    16  # of one object, 64 MB: two spans of photographs, so that what was listed is not fetched again to be decoded
)
THREADS = 16  # requests in flight
OPEN_OBJECTS = 2  # whose parts are kept
READ_AHEAD = 1 << 15  # bytes; what is larger is read where it belongs, not copied there
Answer = TypeVar("Answer")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class BucketLost(RunFailed):
    """Not one object but the bucket, or the way to it, is gone; no sample is to blame."""


def is_address(path: str) -> bool:
    """Whether this names objects, not files: `s3://bucket/prefix/`."""
    return _SCHEME.match(path) is not None


def check_address(address: str) -> None:
    """Refuses what cannot be read, before anything is recorded of it. Nothing is asked of a server.

    Raises:
        CorpusError: an unknown scheme, credentials or a query in it, or obstore is not installed.
    """
    if address.lower().startswith("file:"):
        raise CorpusError(f"{address}: local files are named by their path, without file://")
    try:
        place_of(address)
    except UsageError as error:
        raise CorpusError(str(error)) from None


def list_objects(address: str) -> list[FoundFile]:
    """Everything below an address, in the server's order.

    Raises:
        CorpusError: it cannot be listed.
    """
    import obstore

    try:
        batches = obstore.list(_store(address), chunk_size=1000)
        return [FoundFile(meta["path"], int(meta["size"]), meta["e_tag"]) for batch in batches for meta in batch]
    except Exception as error:  # obstore's errors have no base class in common
        raise CorpusError(f"{address}: cannot be listed: {_why(error)}. {_ADVICE}") from None


def head_objects(addresses: Iterable[str]) -> list[FoundFile | None]:
    """Sizes and states of objects, None for those that are not there; `path` is the whole address.

    Raises:
        CorpusError: the server does not say.
    """
    return list(_threads().map(_head, addresses))


def _head(address: str) -> FoundFile | None:
    import obstore

    folder, _, name = address.rpartition("/")
    try:
        meta = obstore.head(_store(folder), name)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise CorpusError(f"{address}: cannot be read: {_why(error)}. {_ADVICE}") from None
    return FoundFile(address, int(meta["size"]), meta["e_tag"])


def get_object(
    root: str, path: str, num_bytes: int, etag: str | None, start: int = 0, stop: int | None = None
) -> bytes:
    """An object, or bytes start..stop-1 of it, in one request.

    Args:
        root: the address it lies below.
        path: its name there.
        num_bytes: its size as planned.
        etag: its state as planned.
        start: the first byte wanted.
        stop: the first byte not wanted; its end if None.

    Raises:
        OSError: it is gone, has changed since it was planned, or cannot be had.
        BucketLost: nothing can be had of the bucket.
    """
    import obstore

    def request() -> bytes:
        ranged: Any = None if (start, stop) == (0, None) else {"range": (start, num_bytes if stop is None else stop)}
        found = obstore.get(_store(root), path, options=ranged)
        if (found.meta["size"], found.meta["e_tag"]) != (num_bytes, etag):
            raise _ChangedError
        return bytes(found.bytes())

    return _asked(root, path, request)


def get_small(root: str, name: str, most_bytes: int) -> bytes | None:
    """An object; None when it is not there.

    Raises:
        CorpusError: it cannot be had, or is larger.
    """
    import obstore
    from obstore.exceptions import PermissionDeniedError

    try:
        found = obstore.get(_store(root), name)
        data = bytes(found.bytes()) if found.meta["size"] <= most_bytes else None
    except (
        FileNotFoundError,
        PermissionDeniedError,
    ):  # who may not list a bucket is told that what is not there is forbidden
        return None
    except Exception as error:
        raise CorpusError(f"{root}/{name}: cannot be read: {_why(error)}. {_ADVICE}") from None
    if data is None:
        raise CorpusError(f"{root}/{name}: more than {most_bytes:,} bytes. Take it away, or make it smaller.")
    return data


class RemoteObject:
    """An object of a bucket, read in parts by any thread. Parts that `stream` went through are kept for a while."""

    def __init__(self, address: str, num_bytes: int, etag: str | None, parts_kept: int = PARTS_KEPT) -> None:
        """Asks for nothing yet."""
        self._root, _, self._name = address.rpartition("/")
        self._etag, self._parts_kept = etag, parts_kept
        self.num_bytes = num_bytes
        self._parts: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = Lock()

    def stream(self) -> BinaryIO:
        """The object from its start; what is skipped in steps larger than a part is not fetched. Reading raises as `get_object` does."""
        return cast(BinaryIO, io.BufferedReader(_Stream(self), READ_AHEAD))

    def pread(self, start: int, size: int) -> bytes:
        """Bytes from `start` on: of the parts that are kept, else by a request of their own. Raises as `get_object` does."""
        first, last = start // PART_BYTES, (start + size - 1) // PART_BYTES
        with self._lock:
            kept = [self._parts.get(number) for number in range(first, last + 1)]
        whole = [part for part in kept if part and not (part.done() and part.exception())]
        data = b"".join(part.result() for part in whole) if size and len(whole) == len(kept) else None
        if data is None:
            return self._get(start, start + size) if size else b""
        return data[start - first * PART_BYTES :][:size]

    def part(self, number: int) -> Future[bytes]:
        """One of its parts, under way."""
        with self._lock:
            found = self._parts.get(number)
            if found is None or (found.done() and found.exception()):  # a failure is not kept
                start = number * PART_BYTES
                found = _threads().submit(self._get, start, min(start + PART_BYTES, self.num_bytes))
                self._parts[number] = found
            self._parts.move_to_end(number)
            while len(self._parts) > self._parts_kept:
                self._parts.popitem(last=False)
            return found

    def _get(self, start: int, stop: int) -> bytes:
        return get_object(self._root, self._name, self.num_bytes, self._etag, start, stop)


class _Stream(io.RawIOBase):
    def __init__(self, remote: RemoteObject) -> None:
        self._remote, self._position, self._last = remote, 0, -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._remote.num_bytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._remote.num_bytes:
            return 0
        number, offset = divmod(self._position, PART_BYTES)
        part = self._remote.part(number)
        if number == self._last + 1:  # who jumps gets no read-ahead
            end = -(-self._remote.num_bytes // PART_BYTES)
            for ahead in range(number + 1, min(number + 1 + PARTS_AHEAD, end)):
                self._remote.part(ahead)
        self._last = number
        piece = memoryview(part.result())[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


@lru_cache(maxsize=OPEN_OBJECTS)
def open_object(address: str, num_bytes: int, etag: str | None) -> RemoteObject:
    """An object whose parts are shared by all who read it in this process."""
    return RemoteObject(address, num_bytes, etag)


def changed(found: int, planned: int) -> str:
    """That a file is not what it was."""
    return f"the file has changed since the corpus was planned ({found} bytes, then {planned})"


def require_size(descriptor: int, num_bytes: int) -> None:
    """Refuses an open file that has not the size that was planned.

    Raises:
        OSError: so it is.
    """
    size = os.fstat(descriptor).st_size
    if size != num_bytes:
        raise OSError(changed(size, num_bytes))


def open_tar(path: str, num_bytes: int, etag: str | None, *, once: bool = False) -> BinaryIO:
    """A tar as it was planned, at its start; one that is packed with gzip is unpacked, see `gunzip`.

    Args:
        path: of a file, or the address of an object.
        num_bytes: its size as planned.
        etag: its state as planned.
        once: of an object, keep no more than it takes to read on.

    Raises:
        OSError: it is gone, has changed, or cannot be read; for an object, while it is read.
    """
    if is_address(path):
        kept = RemoteObject(path, num_bytes, etag, PARTS_AHEAD + 1) if once else open_object(path, num_bytes, etag)
        return gunzip(kept.stream()) if is_gzip_tar(path) else kept.stream()
    file = open(path, "rb", buffering=READ_AHEAD)  # noqa: SIM115 - handed over
    try:
        require_size(file.fileno(), num_bytes)
    except BaseException:
        file.close()
        raise
    return gunzip(file) if is_gzip_tar(path) else file


@lru_cache(maxsize=16)  # a store keeps its connections
def _store(address: str) -> Any:
    place: Any = place_of(address)
    return place.store


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="objects")


class _ChangedError(Exception):
    """Size or state are not as planned."""


_ADVICE = "Correct the address, or the region, endpoint and credentials in the environment (AWS_REGION, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)."


def _asked(root: str, path: str, request: Callable[[], Answer]) -> Answer:
    try:
        return request()
    except _ChangedError:
        raise OSError("the object has changed since the corpus was planned") from None
    except Exception as error:
        why = _why(error)
        if (isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)) or _answers(root):
            raise OSError(why) from None
    raise BucketLost(
        f"{root}/{path}: cannot be had: {why}; nor can the rest of the bucket. Mend the way to it, or the credentials in the environment."
    )


def _answers(root: str) -> bool:
    """Whether a bucket can be read at all; obstore has tried for long by now."""
    import obstore

    try:
        next(iter(obstore.list(_store(root), chunk_size=1)), None)
    except Exception:
        return False
    return True


def _why(error: Exception) -> str:
    """What went wrong, in words that are the same every time and hold no address."""
    text = str(error)
    if "NoSuchBucket" in text:
        return "no such bucket"
    if isinstance(error, FileNotFoundError):
        return "no such object"
    if status := re.search(r"status code: (\d{3}[A-Za-z ]*)", text):
        return f"the server answers {status[1].strip()}"
    if "error sending request" in text:
        return "the server cannot be reached"
    if invalid := re.search(r"invalid path: (.*)", text):
        return f"an object has a name that cannot be asked for: {invalid[1]}"
    return type(error).__name__
