"""Reads the idx files of the MNIST family (http://yann.lecun.com/exdb/mnist), gzipped or not, in place.

Only headers that say "unsigned bytes, three dimensions" (images) or "one" (labels) are accepted; nothing is unpickled or unpacked to disk.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.problems import CorpusError

MAX_BYTES = 2 << 30  # unpacked; the largest member of the family has 47 MB


@lru_cache(
    maxsize=4
)  # images and labels of two splits: input shards are ranges of one file, and gzip can only be read from its start
def read_idx(path: str, num_dimensions: int) -> NDArray[np.uint8]:
    """A whole idx file.

    Args:
        path: the file; gzipped when it ends in .gz.
        num_dimensions: 3 for images, 1 for labels.

    Returns:
        uint8, not writable: [N, H, W] or [N].

    Raises:
        CorpusError: the file is not what it should be.
        OSError: it cannot be read.
    """
    try:
        with _open(path) as file:
            shape = _shape(file.read(4 + 4 * num_dimensions), num_dimensions, path)
            expected = math.prod(shape)
            data = file.read(expected + 1)  # one more, to see that there is no more
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path}: not a whole gzip file ({error}). Download it again.") from error
    if len(data) != expected:
        found = f"only {len(data)}" if len(data) < expected else "more"
        raise CorpusError(
            f"{path}: its header promises {expected} bytes (shape {shape}), but there are {found}. Download it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_idx_shape(path: str, num_dimensions: int) -> tuple[int, ...]:
    """The shape that the header of an idx file gives, without reading on; raises as `read_idx` does."""
    try:
        with _open(path) as file:
            return _shape(file.read(4 + 4 * num_dimensions), num_dimensions, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path}: not a gzip file ({error}). Download it again.") from error


def _open(path: str) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.endswith(".gz") else Path(path).open("rb")


def _shape(header: bytes, num_dimensions: int, path: str) -> tuple[int, ...]:
    magic = bytes((0, 0, 8, num_dimensions))  # 8: unsigned bytes
    if len(header) != 4 + 4 * num_dimensions or header[:4] != magic:
        raise CorpusError(
            f"{path}: expected an idx file of bytes (it begins with {magic.hex()}), found {header[:4].hex()}."
        )
    shape = struct.unpack(f">{num_dimensions}I", header[4:])
    if math.prod(shape) > MAX_BYTES:
        raise CorpusError(f"{path}: its header claims {math.prod(shape)} bytes; at most {MAX_BYTES} are read.")
    return shape
