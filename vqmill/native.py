"""Whether chunks are read by compiled code (kernels.py; the extra `fast`), or one by one in Python: the same rows and errors, at half the speed.

Compiled code is loaded when this process has decoded so much that it is worth the time (about a second) and the memory (110 MB, two thirds
of it libraries that processes share). Numba compiles it once on a machine, for some ten seconds, and keeps it in `__pycache__` beside
kernels.py or, where that cannot be written, in the user's cache folder ($NUMBA_CACHE_DIR names another): folders that are trusted like the
ones that Python keeps its own compiled files in.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

WORTH_BYTES = 128 * 1024 * 1024  # decoded in Python before: a good part of a second
FUNCTIONS = {  # by the module of whose library they are; None: the C library
    "": ("pread", "memcpy"),
    "google_crc32c._crc32c": ("crc32c_value",),
    "numcodecs.blosc": (
        "blosc_decompress_ctx", "LZ4_decompress_safe", "ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_getFrameContentSize", "ZSTD_decompressDCtx",
    ),
}  # fmt: skip

TILE_WORDS = 64  # of each bit plane, that the compiled code turns together: 8 KiB for uint16

ReadChunks = Callable[..., int]
logger = logging.getLogger(__name__)


class Scratch(NamedTuple):
    """A thread's memory for `kernels.read_chunks`, its last arguments."""

    encoded: np.ndarray[Any, Any]
    planes: np.ndarray[Any, Any]
    tile: np.ndarray[Any, Any]

    @classmethod
    def of(cls, encoded_bytes: int, raw_bytes: int, itemsize: int) -> Scratch:
        """For chunks of at most so many bytes, encoded and decoded, of values of `itemsize` bytes."""
        planes, tile = np.empty(raw_bytes // 8, np.uint64), np.empty(8 * itemsize * TILE_WORDS, np.uint64)
        return cls(np.empty(encoded_bytes, np.uint8), planes, tile)


class UnavailableError(Exception):
    """Why there is no compiled reading here, in a sentence."""


class Native:
    """The compiled function of a process, loaded when it is worth it."""

    def __init__(self, worth_bytes: int = WORTH_BYTES) -> None:
        self._worth_bytes = worth_bytes
        self._seen_bytes = 0
        self._decided = False
        self._read_chunks: ReadChunks | None = None
        self._lock = threading.Lock()

    def read_chunks(self, num_bytes: int) -> ReadChunks | None:
        """`kernels.read_chunks`, for somebody who will else decode so many bytes in Python; None when it is not there (yet).

        While one thread loads it, the others go on in Python.
        """
        if self._decided:
            return self._read_chunks
        self._seen_bytes += num_bytes
        if self._seen_bytes >= self._worth_bytes and self._lock.acquire(blocking=False):
            try:
                self._decide()
            finally:
                self._lock.release()
        return self._read_chunks

    def _decide(self) -> None:
        if self._decided:
            return
        try:
            self._read_chunks = load()
        except UnavailableError as error:
            if importlib.util.find_spec("numba"):
                logger.warning("chunks are read in Python, at half the speed: %s", error)
        self._decided = True


PROCESS = Native()


def load() -> ReadChunks:
    """Loads, and on the first time compiles, `kernels.read_chunks`.

    Raises:
        UnavailableError: it cannot be had on this machine.
    """
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        raise UnavailableError("it is for little-endian machines of 64 bits")
    addresses = _addresses()
    try:
        from llvmlite import binding  # pyright: ignore[reportMissingTypeStubs]

        from vqmill import kernels

        for name, address in addresses.items():
            binding.add_symbol(kernels.SYMBOL_PREFIX + name, address)  # pyright: ignore[reportUnknownMemberType]
        nothing = np.empty((0, 3), np.int64), np.empty((0, 0), np.uint8)
        kernels.read_chunks(*nothing, 1, True, 0, *Scratch.of(0, 0, 1))
        cast("Any", kernels.read_chunks).disable_compile()  # for other types: they would be a mistake of ours
    except ImportError as error:
        raise UnavailableError(
            f"numba cannot be imported ({error}). Get it with: pip install 'vqmill[fast]'"
        ) from error
    except Exception as error:  # numba's and LLVM's have no common base class
        raise UnavailableError(f"numba cannot compile it here: {error}") from error
    return kernels.read_chunks


def _addresses() -> dict[str, int]:
    """Of the C functions, by name: those that numcodecs and google-crc32c brought along, so that both ways decode by the same code."""
    found: dict[str, int] = {}
    for module, names in FUNCTIONS.items():
        try:
            library = ctypes.CDLL(importlib.import_module(module).__file__ if module else None)
            for name in names:
                found[name] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        except (ImportError, OSError, AttributeError) as error:
            raise UnavailableError(
                f"{module or 'the C library'} does not give its functions to others ({error})"
            ) from error
    return found
