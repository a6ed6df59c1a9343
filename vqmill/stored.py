"""Opens a stored array: nothing of it is believed before its metadata is what the store's own says that it must be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from vqmill.bucket import Bucket
from vqmill.chunks import ChunkLayout
from vqmill.errors import CodesError
from vqmill.files import JsonValue
from vqmill.layout import LABEL, shard_file
from vqmill.places import Place, read_file
from vqmill.reader import ChunkSource, ShardedArray
from vqmill.spec import LABEL_FILL, MAX_CHUNK_BYTES, MAX_CHUNKS_PER_SHARD, LevelSpec, StoreSpec

MAX_ARRAY_METADATA_BYTES = 1024 * 1024
KNOWN_CODECS = (
    "bytes",
    "blosc",
    "zstd",
    "crc32c",
    "sharding_indexed",
)  # of the core Zarr v3 specification; others are not read


def stored_array(place: Place, spec: StoreSpec, level: LevelSpec | None, *, any_layout: bool) -> ChunkSource:
    """Gives access to an array's chunks; reads its metadata and nothing else.

    Args:
        place: where the store is.
        spec: the store's specification.
        level: which level; None for the labels.
        any_layout: whether zarr-python may read what is arranged otherwise than our writers do it.

    Raises:
        CodesError: the metadata is missing, damaged, or not that of the array which the specification names.
    """
    name, dtype, grid, fill = _expected(level)
    metadata = _read(place, name)
    wrong = list(_differences(metadata, spec, dtype, grid, fill))
    if wrong:
        raise CodesError(
            f"{place.name}: array '{name}' is not stored as zarr.json says: {'; '.join(wrong)} (docs/format.md). Restore the store's metadata from a copy."
        )
    layout = _own_layout(metadata["codecs"], spec.rows_per_shard, dtype, grid)
    files = partial(shard_file, name, grid_dimensions=len(grid))
    if layout is None and any_layout:
        return ZarrArray(place, name, spec, grid, dtype)
    if layout is None:
        raise CodesError(
            f"{place.name}: the chunks of array '{name}' are not arranged as docs/format.md says. If you trust this store, open it with "
            "any_layout=True: zarr-python then reads it, slowly, and takes memory on the word of its chunks."
        )
    row_bytes = layout.raw_bytes // layout.chunk_shape[0]
    if layout.raw_bytes > max(MAX_CHUNK_BYTES, row_bytes) or layout.chunks_per_shard > MAX_CHUNKS_PER_SHARD:
        raise CodesError(
            f"{place.name}: array '{name}' has {layout.chunks_per_shard:,} chunks of {layout.raw_bytes:,} bytes in a Zarr shard; at most "
            f"{MAX_CHUNKS_PER_SHARD:,} chunks of one row or {MAX_CHUNK_BYTES:,} bytes are read."
        )
    return ShardedArray(place, files, layout)


class ZarrArray:
    """Chunks of an array whose codecs are known but arranged otherwise than our writers do it: read by zarr-python, slowly and rightly."""

    def __init__(self, place: Place, name: str, spec: StoreSpec, grid: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        import zarr
        from zarr.storage import LocalStore, ObjectStore

        try:
            files: Any = ObjectStore(place.store) if isinstance(place, Bucket) else LocalStore(place.name)
            self._array = zarr.open_array(files, path=name, mode="r", zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
        except Exception as error:  # zarr has no common error for damaged metadata: also Type, Attribute, Recursion
            raise CodesError(
                f"{place.name}: array '{name}' cannot be opened ({error}). See: vqmill verify {place.name}"
            ) from error
        self._place, self._file = place, partial(shard_file, name, grid_dimensions=len(grid))
        self._spec, self.dtype = spec, dtype
        self.chunk_shape = (self._array.chunks[0], *grid)

    def read_chunk(self, chunk: int, out: np.ndarray[Any, Any]) -> None:
        """See `reader.ChunkSource`."""
        first = chunk * len(out)
        try:
            self._place.open(self._file(first // self._spec.rows_per_shard))  # which refuses links and what is no file
            values = np.asarray(self._array[first : min(first + len(out), self._spec.num_rows)])
        except Exception as error:  # zarr and its codecs have no common error
            raise CodesError(str(error)) from error
        out[: len(values)] = values

    def read_chunks(self, chunks: Sequence[int], out: np.ndarray[Any, Any], below: int) -> int:
        """None at once: see `reader.ChunkSource`."""
        return 0


def _expected(level: LevelSpec | None) -> tuple[str, np.dtype[Any], tuple[int, ...], int]:
    if level is None:
        return LABEL, np.dtype(np.int64), (), LABEL_FILL
    return level.name, level.dtype, level.grid, level.fill_value


def _read(place: Place, name: str) -> dict[str, Any]:
    file = f"{name}/zarr.json"
    try:
        metadata: JsonValue = json.loads(read_file(place, file, MAX_ARRAY_METADATA_BYTES))
        if not isinstance(metadata, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CodesError(
            f"{place.name}: array '{name}' cannot be opened: {file}: {error}. See: vqmill verify {place.name}"
        ) from error
    return metadata


def _differences(
    metadata: dict[str, Any], spec: StoreSpec, dtype: np.dtype[Any], grid: tuple[int, ...], fill: int
) -> list[str]:
    expected: dict[str, JsonValue] = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype.name,
        "fill_value": fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [spec.rows_per_shard, *grid]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    wrong = [
        f"{key} is {_short(metadata.get(key))}, expected {_short(value)}"
        for key, value in expected.items()
        if metadata.get(key) != value
    ]
    if metadata.get("storage_transformers"):
        wrong.append("storage transformers are not read")
    shape: JsonValue = metadata.get("shape")
    match shape:
        case [int(rows), *others] if rows >= spec.num_rows and others == list(grid):
            pass
        case _:
            wrong.append(f"shape is {_short(shape)}, expected [{spec.num_rows} or more, {', '.join(map(str, grid))}]")
    foreign: list[str] = sorted(set(_codec_names(metadata.get("codecs"))) - set(KNOWN_CODECS))
    if foreign or not metadata.get("codecs"):
        wrong.append(f"codecs {_short([*foreign])} are not read, only {', '.join(KNOWN_CODECS)}")
    return wrong


def _codec_names(codecs: Any) -> list[str]:
    """Names of all codecs, those inside others among them; what is no codec gives a name that is not known."""
    if not isinstance(codecs, list):
        return ["?"]
    names: list[str] = []
    for codec in cast("list[Any]", codecs):
        match codec:
            case {"name": str(name)}:
                names.append(name)
            case _:
                names.append("?")
        match codec:
            case {"configuration": {"codecs": inner, "index_codecs": index}}:
                names += [*_codec_names(inner), *_codec_names(index)]
            case _:
                pass
    return names


def _own_layout(codecs: Any, rows_per_shard: int, dtype: np.dtype[Any], grid: tuple[int, ...]) -> ChunkLayout | None:
    """The layout of chunks, when they are arranged as docs/format.md says; None when not."""
    crc, little = {"name": "crc32c"}, {"name": "bytes", "configuration": {"endian": "little"}}
    match codecs:
        case [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [int(rows), *inner_grid],
                    "codecs": [order, {"name": "blosc" | "zstd" as compressor}, inner_crc],
                    "index_codecs": [index_order, index_crc],
                    "index_location": "end",
                },
            }
        ] if (  # fmt: skip
            0 < rows <= rows_per_shard
            and rows_per_shard % rows == 0
            and inner_grid == list(grid)
            and (order == little or (dtype.itemsize == 1 and order == {"name": "bytes"}))
            and (inner_crc, index_order, index_crc) == (crc, little, crc)
        ):
            return ChunkLayout((rows, *grid), dtype, rows_per_shard // rows, compressor)
        case _:
            return None


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
