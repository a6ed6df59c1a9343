"""Reads whole chunks without Python in between: compiled by numba, around the C functions that native.py found. Only native.py imports it.

All that `chunks.decode_chunk` checks is checked here too, and codes against K. What is wrong is not said here: the Python path reads such a
chunk again, and says it. Streams of Blosc with bitshuffle, as our writers make them, are decoded by their codec and then turned by
`_unshuffle`, which takes a quarter of the time that Blosc's own takes in numcodecs, built for any processor. The layout of such a chunk is
that of c-blosc's README_CHUNK_FORMAT.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types

from vqmill.native import TILE_WORDS

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint64]]
Table = np.ndarray[Any, np.dtype[np.int64]]
Function = TypeVar("Function", bound=Callable[..., Any])

SYMBOL_PREFIX = "vqmill_"  # LLVM knows one address for each name in a process: these are ours
NIBBLES, PAIRS, BITS = (np.uint64(mask) for mask in (0x0F0F0F0F0F0F0F0F, 0x3333333333333333, 0x5555555555555555))
FOURS, TWOS, ONES = (np.uint64(mask) for mask in (0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF))
TWO, THREE, FOUR = np.uint64(2), np.uint64(3), np.uint64(4)
BLOSC_HEADER_BYTES, BLOSC_VERSION, BITSHUFFLE, NOT_SPLIT, LZ4, ZSTD = 16, 2, 0x04, 0x10, 1, 4
MIN_SPLIT = 128  # elements of a block, from which on Blosc may make a stream of each of their bytes


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(SYMBOL_PREFIX + name, result(*arguments))


_size, _int = types.uintp, types.int32  # an address is a size, too
_pread = _function("pread", types.intp, _int, _size, _size, types.int64)
_memcpy = _function("memcpy", _size, _size, _size, _size)
_crc32c = _function("crc32c_value", types.uint32, _size, _size)
_blosc = _function("blosc_decompress_ctx", _int, _size, _size, _size, _int)
_lz4 = _function("LZ4_decompress_safe", _int, _size, _size, _int, _int)
_zstd = _function("ZSTD_decompressDCtx", _size, _size, _size, _size, _size, _size)
_zstd_size = _function("ZSTD_getFrameContentSize", types.uint64, _size, _size)
_zstd_create = _function("ZSTD_createDCtx", _size)
_zstd_free = _function("ZSTD_freeDCtx", _size, _size)


def _compiled(function: Function) -> Function:
    """Compiled at the first call, without the GIL; kept on the disk where numba finds a folder to write into."""
    options: dict[str, Any] = {"nogil": True, "boundscheck": False}
    try:
        return cast("Function", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no such folder: compiled in each process
        return cast("Function", numba.njit(**options)(function))


@_compiled
def read_chunks(
    table: Table, out: Bytes, itemsize: int, is_blosc: bool, below: int, encoded: Bytes, planes: Words, tile: Words
) -> int:  # fmt: skip
    """Reads, checks and decodes chunks one after the other, up to the first one that is not right.

    Args:
        table: int64 [n, 3], file descriptor, offset and size of each chunk, its CRC-32C with it.
        out: uint8 [n, bytes of a chunk], C-contiguous.
        itemsize: bytes of a value, 1, 2, 4 or 8.
        is_blosc: else it is a Zstandard frame.
        below: every value must be less; 0 when any may be.
        encoded: room for the largest size in the table.
        planes: room for a decoded chunk.
        tile: uint64 [8 * itemsize * TILE_WORDS].

    Returns:
        How many chunks are right: n, or the place of the first that is not.
    """
    context = _zstd_create()
    done = 0
    while context != 0 and done < len(table):
        size = table[done, 2]
        if size < 4 or size > len(encoded):
            break
        start = encoded.ctypes.data
        if _pread(table[done, 0], start, size, table[done, 1]) != size:
            break
        size -= 4
        if _crc32c(start, size) != _number(encoded, size):
            break
        chunk = out[done]
        if is_blosc:
            right = _decode_blosc(context, encoded, size, chunk, itemsize, planes, tile)
        else:
            right = _zstd_size(start, size) == len(chunk)
            right = right and _zstd(context, chunk.ctypes.data, len(chunk), start, size) == len(chunk)
        if not right or not (below == 0 or _highest(chunk, itemsize) < np.uint64(below)):
            break
        done += 1
    _zstd_free(context)
    return done


@_compiled
def _number(data: Bytes, at: int) -> int:
    """A little-endian uint32 at an offset that must be there."""
    low, high = np.int64(data[at]) | np.int64(data[at + 1]) << 8, np.int64(data[at + 2]) | np.int64(data[at + 3]) << 8
    return int(low | high << 16)


@_compiled
def _highest(chunk: Bytes, itemsize: int) -> np.uint64:
    if itemsize == 1:
        return np.uint64(_maximum(chunk))
    if itemsize == 2:
        return np.uint64(_maximum(chunk.view(np.uint16)))
    if itemsize == 4:
        return np.uint64(_maximum(chunk.view(np.uint32)))
    return np.uint64(_maximum(chunk.view(np.uint64)))


@_compiled
def _maximum(values: np.ndarray[Any, Any]) -> np.unsignedinteger[Any]:
    """What `values.max()` says; LLVM makes this loop work on many at a time, and numba's own not."""
    highest = values[0]
    for place in range(len(values)):
        highest = max(highest, values[place])
    return highest


@_compiled
def _decode_blosc(
    context: int, data: Bytes, size: int, chunk: Bytes, itemsize: int, planes: Words, tile: Words
) -> bool:
    raw = len(chunk)
    if size < BLOSC_HEADER_BYTES or _number(data, 4) != raw or _number(data, 12) != size:
        return False
    block_bytes, flags = _number(data, 8), data[2]
    codec, group = flags >> 5, 64 * itemsize
    if (
        data[0] != BLOSC_VERSION or data[1] != 1 or data[3] != itemsize or flags & 0x0F != BITSHUFFLE
        or (codec != LZ4 and codec != ZSTD) or not 0 < block_bytes <= raw or block_bytes % group or raw % group
    ):  # fmt: skip
        return _blosc(data.ctypes.data, chunk.ctypes.data, raw, 1) == raw
    blocks = (raw + block_bytes - 1) // block_bytes
    if size < BLOSC_HEADER_BYTES + 4 * blocks:
        return False
    for number in range(blocks):
        first = number * block_bytes
        here = min(block_bytes, raw - first)
        whole = here == block_bytes
        streams = itemsize if whole and not flags & NOT_SPLIT and here // itemsize >= MIN_SPLIT else 1
        at = _number(data, BLOSC_HEADER_BYTES + 4 * number)
        if not _decode_streams(context, data, size, at, codec, streams, here // streams, planes):
            return False
        _unshuffle(planes[: here // 8], chunk[first : first + here].view(np.uint64), itemsize, tile)
    return True


@_compiled
def _decode_streams(
    context: int, data: Bytes, size: int, at: int, codec: int, streams: int, length: int, planes: Words
) -> bool:
    """Decodes the streams of a block, which lie one behind the other from `at` on, to `length` bytes each."""
    for number in range(streams):
        if at > size - 4:
            return False
        encoded = _number(data, at)
        at += 4
        if encoded > size - at:
            return False
        source, target = data.ctypes.data + np.uint64(at), planes.ctypes.data + np.uint64(number * length)
        if encoded == length:
            _memcpy(target, source, length)
        elif codec == ZSTD:
            if _zstd(context, target, length, source, encoded) != length:
                return False
        elif _lz4(source, target, encoded, length) != length:
            return False
        at += encoded
    return True


@_compiled
def _unshuffle(planes: Words, out: Words, itemsize: int, tile: Words) -> None:
    """Undoes bitshuffle: from the values' bits 0, their bits 1, ... (planes, one behind the other) to the values.

    Two transpositions of 8 x 8: of the bits of each byte of the values, then of the bytes of eight values. Each works on whole words, in
    a tile that stays in the first cache.
    """
    words, slots = len(planes) // (8 * itemsize), 8 * itemsize
    for start in range(0, words, TILE_WORDS):
        count = min(TILE_WORDS, words - start)
        for byte in range(itemsize):
            first, slot = start + 8 * byte * words, byte * TILE_WORDS
            _transpose(planes, first, words, tile, slot, itemsize * TILE_WORDS, count, 1, NIBBLES, PAIRS, BITS)
        for first in range(0, slots * TILE_WORDS, 8 * TILE_WORDS):
            _transpose(tile, first, TILE_WORDS, tile, first, TILE_WORDS, count, 8, FOURS, TWOS, ONES)
        for slot in range(slots):
            to = slots * start + itemsize * (slot & 7) + (slot >> 3)
            for word in range(count):
                out[to + slots * word] = tile[slot * TILE_WORDS + word]


@numba.njit(inline="always")
def _transpose(
    source: Words, first: int, step: int, target: Words, to: int, target_step: int, count: int,
    shift: int, fours: np.uint64, twos: np.uint64, ones: np.uint64,
) -> None:  # fmt: skip
    """Transposes 8 x 8 bits (shift 1) or bytes (shift 8), `count` times: rows are eight words, a step apart (Warren, Hacker's Delight, 7-3)."""
    near, half, far = np.uint64(shift), np.uint64(2 * shift), np.uint64(4 * shift)
    x, y = (
        np.uint64(step),
        np.uint64(target_step),
    )  # unsigned places cannot count from the end: only so the loop becomes a vector's
    for word in range(np.uint64(count)):
        at = np.uint64(first) + word
        a, b, c, d = source[at], source[at + x], source[at + TWO * x], source[at + THREE * x]
        at += FOUR * x
        e, f, g, h = source[at], source[at + x], source[at + TWO * x], source[at + THREE * x]
        a, e = _swap(a, e, far, fours)
        b, f = _swap(b, f, far, fours)
        c, g = _swap(c, g, far, fours)
        d, h = _swap(d, h, far, fours)
        a, c = _swap(a, c, half, twos)
        b, d = _swap(b, d, half, twos)
        e, g = _swap(e, g, half, twos)
        f, h = _swap(f, h, half, twos)
        a, b = _swap(a, b, near, ones)
        c, d = _swap(c, d, near, ones)
        e, f = _swap(e, f, near, ones)
        g, h = _swap(g, h, near, ones)
        at = np.uint64(to) + word
        target[at], target[at + y], target[at + TWO * y], target[at + THREE * y] = a, b, c, d
        at += FOUR * y
        target[at], target[at + y], target[at + TWO * y], target[at + THREE * y] = e, f, g, h


@numba.njit(inline="always")
def _swap(low: np.uint64, high: np.uint64, shift: np.uint64, mask: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Swaps the bits of `low` that the mask does not name with those of `high` that it names."""
    changed = (low >> shift ^ high) & mask
    return low ^ changed << shift, high ^ changed
