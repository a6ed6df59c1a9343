"""What lies inside a Zarr shard: the layout of its chunks, and how one is decoded. Pure: no files.

A reader can be written from docs/format.md; this is ours, for the codecs that our writers use. Nothing that a file says is believed before
it is checked, and no memory is taken on its word.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, cast

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd  # pyright: ignore

from vqmill.errors import CodesError

INDEX_ENTRY_BYTES = 16  # offset and size, uint64
MISSING = 2**64 - 1  # the offset of a chunk that was not written
CRC_BYTES = 4
OVERHEAD_BYTES = (
    1024  # by which either compressor may exceed the raw size, for chunks up to 256 KiB; above, a 256th of it
)


@dataclass(frozen=True)
class ChunkLayout:
    """How an array is cut and encoded.

    Attributes:
        chunk_shape: rows of a chunk, then the grid.
        dtype: of the values, little endian.
        chunks_per_shard: chunks of a Zarr shard, one behind the other.
        compressor: `blosc` (any of its inner codecs) or `zstd`; a CRC-32C follows.
    """

    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks_per_shard: int
    compressor: str

    @property
    def raw_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def max_chunk_bytes(self) -> int:
        """Bytes that an encoded chunk can have, its checksum with it."""
        return self.raw_bytes + max(OVERHEAD_BYTES, self.raw_bytes // 256) + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of a Zarr shard's index, its checksum with it."""
        return self.chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES


def crc32c(data: np.ndarray[Any, Any] | bytes) -> int:
    """The CRC-32C of bytes (RFC 3720, appendix B.4)."""
    return cast("int", google_crc32c.value(data))  # pyright: ignore[reportUnknownMemberType]


def decode_chunk(encoded: np.ndarray[Any, Any], layout: ChunkLayout, out: np.ndarray[Any, Any]) -> None:
    """Checks and decodes one chunk; the GIL is released while it is decoded.

    Args:
        encoded: uint8 [m], the compressed chunk and its CRC-32C.
        layout: says what to expect.
        out: C-contiguous memory of the chunk's shape and dtype.

    Raises:
        CodesError: it is damaged, or would decode to another size.
    """
    data = encoded[:-CRC_BYTES]
    if len(encoded) < CRC_BYTES or crc32c(data) != int.from_bytes(encoded[-CRC_BYTES:].tobytes(), "little"):
        raise CodesError("damaged: its CRC-32C differs")
    size = _blosc_size(data) if layout.compressor == "blosc" else _zstd_size(data)
    if size != layout.raw_bytes:
        raise CodesError(f"damaged: it says that it decodes to {size} bytes, expected {layout.raw_bytes}")
    try:
        if layout.compressor == "blosc":
            blosc.decompress(data, out)  # pyright: ignore[reportUnknownMemberType]
        else:
            zstd.decompress(data, out)  # pyright: ignore[reportUnknownMemberType]
    except (RuntimeError, ValueError) as error:
        raise CodesError(f"damaged: it cannot be decoded ({error})") from error


def _blosc_size(data: np.ndarray[Any, Any]) -> int | None:
    """The decoded size from a Blosc 1 header; None when it is not one, or is of other data than these."""
    if len(data) < 16:
        return None
    decoded, _, encoded = struct.unpack_from("<III", data.data, 4)
    return decoded if encoded == len(data) else None


def _zstd_size(data: np.ndarray[Any, Any]) -> int | None:
    """The decoded size from a Zstandard frame header (RFC 8878, 3.1.1.1); None when it is not one, or does not say."""
    header = data[:18].tobytes()
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = header[4]
    size_flag, single_segment, dictionary_flag = descriptor >> 6, descriptor >> 5 & 1, descriptor & 3
    if size_flag == 0 and not single_segment:
        return None
    start = 5 + (not single_segment) + (0, 1, 2, 4)[dictionary_flag]
    width = (1, 2, 4, 8)[size_flag]
    return int.from_bytes(header[start : start + width], "little") + (256 if size_flag == 1 else 0)
