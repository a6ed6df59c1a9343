"""A strict reader of the tar format: a stream of bytes becomes members, or says at which byte it cannot go on.

Nothing is extracted and no name is used as a path. Read are ustar with its prefix, GNU long names, base-256 sizes, and pax paths and sizes.
(Python's `tarfile` takes a damaged header for the end of the archive, and so loses the rest without a word.)
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipelines.corpus.names import text_of
from pipelines.corpus.problems import Reason

BLOCK = 512
MAX_METADATA_BYTES = 1 << 20  # of one long name or pax header; real ones hold a path
SKIP_BYTES = 1 << 20  # how much is read at once to get past data in a stream that cannot seek
_ZEROS = bytes(BLOCK)
_BLANK = b" " * 8
_WITHOUT_DATA = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "pipe",
}


class TarDamage(Exception):  # noqa: N818 - a fact about the data, which becomes a row
    """The tar cannot be read on.

    Attributes:
        reason: truncated or damaged_tar.
        detail: what is wrong and at which byte.
        offset: where, in bytes from the start.
        name: the member in which it happened, None between members.
    """

    def __init__(self, reason: Reason, offset: int, what: str, name: str | None = None) -> None:
        self.reason, self.offset, self.name = reason, offset, name
        self.detail = f"byte {offset}: {what}"
        super().__init__(self.detail)


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar.

    Attributes:
        name: the whole path as stored; text, never used as a path.
        offset: where its data begins, in bytes.
        size: its data, in bytes; all of them are there when the stream can seek.
        special: None for a regular file, else what it is, such as `symbolic link`.
    """

    name: str
    offset: int
    size: int
    special: str | None


class TarStream:
    """Walks a tar forwards: iterate over its members, and `read` the ones that are wanted."""

    def __init__(self, stream: BinaryIO) -> None:
        """Takes a stream at the start of a tar; one that can seek is skipped through, another is read through and may raise TarDamage."""
        self._stream = stream
        self._position = 0
        self._end: int | None = None
        if stream.seekable():
            self._end = stream.seek(0, io.SEEK_END)
            stream.seek(0)

    def __iter__(self) -> Iterator[Member]:
        """Members in order.

        Raises:
            TarDamage: there is no going on; what was yielded before is sound.
        """
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        ended = False
        while True:
            offset = self._position
            block = self._take(BLOCK)
            if not block:
                break
            if len(block) < BLOCK:
                raise TarDamage(
                    Reason.TRUNCATED, offset, f"the file ends after {len(block)} of the {BLOCK} bytes of a block"
                )
            if block == _ZEROS:
                # Tars appended to each other (`cat a.tar b.tar`) have such blocks between them; other readers stop here and lose the rest.
                ended = True
                continue
            ended = False
            _check(block, offset)
            kind, size = block[156:157], _number(block[124:136], offset)
            if kind in (b"L", b"x", b"K", b"g"):
                body = self._metadata(size, offset)
                if kind == b"L":
                    long_name = body.rstrip(b"\0")
                elif kind == b"x":
                    pax = _pax_records(body, offset)
                continue
            name = text_of(pax.get(b"path") or long_name or _short_name(block))
            special = _special(kind, name, pax)
            if kind in _WITHOUT_DATA or (special == "directory" and kind != b"D"):
                size = 0
            elif b"size" in pax:
                size = _decimal(pax[b"size"], offset)
            if kind == b"S":
                self._skip_sparse_map(block, name)
            if self._end is not None and self._position + size > self._end:
                there = self._end - self._position
                raise TarDamage(
                    Reason.TRUNCATED,
                    self._position,
                    f"the file ends after {there} of the {size} bytes of {name!r}",
                    name,
                )
            member = Member(name, self._position, size, special)
            yield member
            self._skip(member)
            long_name, pax = None, {}
        if not ended:
            what = (
                "the file is empty"
                if self._position == 0
                else "the end-of-archive mark is missing, so the file may have been cut here"
            )
            raise TarDamage(Reason.TRUNCATED, self._position, what)

    def read(self, member: Member) -> bytes:
        """The data of the member that iteration has just given.

        Raises:
            TarDamage: the stream ends before it does.
        """
        data = self._take(member.size, member.name)
        if len(data) < member.size:
            what = f"the file ends after {len(data)} of the {member.size} bytes of {member.name!r}"
            raise TarDamage(Reason.TRUNCATED, member.offset, what, member.name)
        return data

    def _metadata(self, size: int, offset: int) -> bytes:
        if size > MAX_METADATA_BYTES:
            raise TarDamage(
                Reason.DAMAGED_TAR,
                offset,
                f"a header extension claims {size} bytes (at most {MAX_METADATA_BYTES} are read)",
            )
        padded = size + -size % BLOCK
        body = self._take(padded)
        if len(body) < padded:
            raise TarDamage(Reason.TRUNCATED, offset, "the file ends inside a header extension")
        return body[:size]

    def _skip_sparse_map(self, block: bytes, name: str) -> None:
        """Passes over the further blocks of an old GNU sparse header."""
        more = block[482]
        while more:
            offset = self._position
            extension = self._take(BLOCK, name)
            if len(extension) < BLOCK:
                raise TarDamage(Reason.TRUNCATED, offset, f"the file ends inside the sparse map of {name!r}", name)
            more = extension[504]

    def _skip(self, member: Member) -> None:
        """Moves past a member's data. Should only the padding after it be missing, the data is whole, and the lack of an end mark tells."""
        end = member.offset + member.size
        position = end + -member.size % BLOCK
        if self._end is not None:
            position = min(position, self._end)
            if position != self._position:
                self._position = position
                self._stream.seek(position)
            return
        while self._position < end:
            if not self._take(min(end - self._position, SKIP_BYTES), member.name):
                raise TarDamage(Reason.TRUNCATED, self._position, f"the file ends inside {member.name!r}", member.name)
        self._take(position - self._position)

    def _take(self, size: int, name: str | None = None) -> bytes:
        """The next bytes, fewer only at the end; damage of the stream falls into the member of this name."""
        try:
            data = self._stream.read(size)
        except TarDamage as damage:
            damage.name = name
            raise
        self._position += len(data)
        return data


def _check(block: bytes, offset: int) -> None:
    """Holds a header against its checksum; some old writers summed signed bytes."""
    stored = _number(block[148:156], offset)
    covered = block[:148] + _BLANK + block[156:]
    # zlib counts the sum modulo 65521, which half a block of non-zero bytes cannot reach; Python's own sum takes 20 times as long.
    sparse = covered.count(0) >= BLOCK // 2
    unsigned = (zlib.adler32(covered) - 1) & 0xFFFF if sparse else sum(covered)
    if stored == unsigned or stored == unsigned - 256 * sum(byte > 127 for byte in covered):
        return
    raise TarDamage(Reason.DAMAGED_TAR, offset, f"not a tar header (its checksum is {unsigned}, it says {stored})")


def _number(field: bytes, offset: int) -> int:
    """A number of a header: octal digits, or base 256 when the first bit is set."""
    plain = field.rstrip(b"\0 ")
    if plain.isdigit() and b"8" not in plain and b"9" not in plain:
        return int(plain, 8)
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise TarDamage(Reason.DAMAGED_TAR, offset, f"not a tar header (the number {field!r} is not octal)")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, offset: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise TarDamage(Reason.DAMAGED_TAR, offset, f"a pax header has the number {digits[:40]!r}")
    return int(digits)


def _short_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # GNU's own magic, `ustar  `, has times where POSIX has the prefix
        prefix = block[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _pax_records(body: bytes, offset: int) -> dict[bytes, bytes]:
    r"""Reads `LENGTH KEY=VALUE\n` records, where LENGTH counts the whole record."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(body):
        digits, blank, _ = body[start : start + 21].partition(b" ")
        stop = start + _decimal(digits, offset)
        key, equals, value = body[start + len(digits) + 1 : stop].partition(b"=")
        if not (blank and equals and value.endswith(b"\n") and stop <= len(body)):
            raise TarDamage(Reason.DAMAGED_TAR, offset, "a pax header is malformed")
        records[key] = value[:-1]
        start = stop
    return records


def _special(kind: bytes, name: str, pax: dict[bytes, bytes]) -> str | None:
    """What a member is when it is no regular file."""
    if kind in _WITHOUT_DATA:
        return _WITHOUT_DATA[kind]
    if kind == b"S" or (pax and any(key.startswith(b"GNU.sparse.") for key in pax)):
        return "sparse file"
    if kind in (b"\0", b"0", b"7"):
        return "directory" if name.endswith("/") else None  # as tars from before 1988 mark them
    return "directory" if kind == b"D" else f"member of type {kind.decode('latin-1')!r}"
