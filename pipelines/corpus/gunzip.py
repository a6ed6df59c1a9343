"""Unpacks a gzip stream as it is read, up to a limit; damage is told with its place, and all that comes whole before it is given."""

from __future__ import annotations

import io
import zlib
from typing import Any, BinaryIO, cast

from pipelines.corpus.problems import Reason
from pipelines.corpus.tar import TarDamage

PIECE_BYTES = 1 << 14  # unpacked at a time: no more than 17 MB come of it, as deflate shrinks to 1/1032 at most
MOST_RATIO = (
    20  # of what comes out to what goes in, at every place; tars of many small images reach 3 to 8, by their headers
)
SLACK_BYTES = 64 << 20  # beyond that: room for the best packed stretches of a good tar
READ_AHEAD = 1 << 15


def gunzip(packed: BinaryIO) -> BinaryIO:
    """The unpacked bytes of a gzip stream of one or more members, forwards only. Zeros behind a member are padding.

    Reading raises TarDamage, as soon as nothing is left that came before: reason `truncated` where the stream ends too early,
    `too_many_bytes` where it unpacks to more than MOST_RATIO times what was read of it, and SLACK_BYTES; else `damaged_tar`.

    Args:
        packed: from its start; closed together with what is returned.
    """
    return cast(BinaryIO, io.BufferedReader(_Gunzip(packed), READ_AHEAD))


class _Gunzip(io.RawIOBase):
    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._inflater: Any = _inflater()  # None between members
        self._rest = b""  # read and not yet unpacked
        self._unpacked = memoryview(b"")  # and not yet given
        self._num_in = self._num_out = 0
        self._damage: tuple[Reason, str] | None = None  # told when all before it is given

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if self._damage:
                reason, what = self._damage
                raise TarDamage(reason, self._num_out, f"the gzip stream {what}")
            piece = self._rest or self._packed.read(PIECE_BYTES)
            if not piece and self._inflater is None:
                return 0
            self._unpacked = memoryview(self._unpack(piece))
            self._num_out += len(self._unpacked)
            if self._num_out > MOST_RATIO * self._num_in + SLACK_BYTES:
                what = f"unpacks to more than {MOST_RATIO} times the {self._num_in} bytes of the file up to here"
                self._damage = (Reason.TOO_MANY_BYTES, what)
        given = self._unpacked[: len(buffer)]
        buffer[: len(given)] = given
        self._unpacked = self._unpacked[len(given) :]
        return len(given)

    def _unpack(self, piece: bytes) -> bytes:
        """What the next piece of the stream unpacks to; an empty one is its end."""
        if not piece:
            self._damage = (Reason.TRUNCATED, f"ends too early, at byte {self._num_in} of the file")
            return b""
        if self._inflater is None:
            self._rest = piece.lstrip(b"\0")
            self._num_in += len(piece) - len(self._rest)
            self._inflater = _inflater() if self._rest else None
            return b""
        before = self._inflater.copy()
        try:
            unpacked = self._inflater.decompress(piece)
        except zlib.error as error:
            return self._unpack_before(error, before, piece)
        self._rest = self._inflater.unused_data
        self._num_in += len(piece) - len(self._rest)
        if self._inflater.eof:
            self._inflater = None
        return unpacked

    def _unpack_before(self, error: zlib.error, inflater: Any, piece: bytes) -> bytes:
        """What lies before an error, which zlib keeps to itself when it is given more at once."""
        unpacked: list[bytes] = []
        for place in range(len(piece)):
            try:
                unpacked.append(inflater.decompress(piece[place : place + 1]))
            except zlib.error:
                break
        self._num_in += len(unpacked)
        what = str(error).rpartition(": ")[2]
        self._damage = (Reason.DAMAGED_TAR, f"is damaged at byte {self._num_in} of the file ({what})")
        return b"".join(unpacked)


def _inflater() -> Any:
    return zlib.decompressobj(zlib.MAX_WBITS | 16)
