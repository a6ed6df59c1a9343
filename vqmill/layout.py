"""The store's files: where they lie, and how the bytes of each are made. No commit order here; that is writer.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from vqmill.errors import CodesError, UsageError
from vqmill.files import JsonValue, canonical_json, sealed
from vqmill.kinds import STORE_FILE, wrong_place
from vqmill.places import Folder, Place, Where, place_of, read_file
from vqmill.spec import CODECS, LABEL_FILL, MISSING_LABEL, LevelSpec, StoreSpec

if TYPE_CHECKING:
    import pyarrow as pa

LABEL = "label"
GROUP = STORE_FILE  # the file that readers trust
FASTEST = "blosc-lz4"
NEARLY = 1.02  # so much larger is given for chunks that decode two to four times as fast
MAX_METADATA_BYTES = 16 * 1024 * 1024


def shard_file(array: str, shard: int, grid_dimensions: int) -> str:
    """The key of one Zarr shard, relative to the store: `top/c/3/0/0`."""
    return "/".join([array, "c", str(shard), *["0"] * grid_dimensions])


def samples_file(shard: int) -> str:
    """The Parquet part with one row per code row of a Zarr shard."""
    return f"samples/part-{shard:06d}.parquet"


def quarantine_file(shard: int) -> str:
    """The Parquet part with one row per sample that was set aside."""
    return f"quarantine/part-{shard:06d}.parquet"


def commit_file(shard: int) -> str:
    """The record that makes a Zarr shard count."""
    return f"commits/shard-{shard:06d}.json"


def shard_files(spec: StoreSpec, shard: int, rows: int) -> list[str]:
    """Every file of one Zarr shard, by its path in the store."""
    tables = [samples_file(shard), quarantine_file(shard)]
    if rows == 0:
        return tables
    levels = [shard_file(level.name, shard, len(level.grid)) for level in spec.levels]
    return [*levels, shard_file(LABEL, shard, 0), *tables]


def level_array(spec: StoreSpec, level: LevelSpec, num_rows: int) -> zarr.Array[Any]:
    """An empty Zarr array in memory, with exactly the metadata and codecs of the stored one."""
    return zarr.create_array(  # pyright: ignore[reportUnknownMemberType]
        MemoryStore(),
        shape=(num_rows, *level.grid),
        shards=(spec.rows_per_shard, *level.grid),
        chunks=(level.rows_per_chunk(spec.rows_per_shard), *level.grid),
        dtype=level.dtype,
        compressors=[_compressor(spec.codec or CODECS[0], level.dtype.itemsize), Crc32cCodec()],
        fill_value=level.fill_value,
        dimension_names=level.axes,
        config={"write_empty_chunks": True},  # an all-fill chunk that leaves no bytes looks like a lost one
    )


def label_array(spec: StoreSpec, num_rows: int) -> zarr.Array[Any]:
    """The same for the labels: int64 [N], -1 where there is none."""
    return zarr.create_array(  # pyright: ignore[reportUnknownMemberType]
        MemoryStore(),
        shape=(num_rows,),
        shards=(spec.rows_per_shard,),
        chunks=(spec.rows_per_shard,),
        dtype=np.int64,
        compressors=[_compressor(CODECS[0], 8), Crc32cCodec()],
        fill_value=LABEL_FILL,
        dimension_names=("row",),
        config={"write_empty_chunks": True},
    )


def _compressor(codec: str, itemsize: int) -> BloscCodec | ZstdCodec:
    match codec:
        case "blosc-zstd":
            return BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=itemsize)
        case "blosc-lz4":
            return BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=itemsize)
        case name:
            assert name == "zstd", name
            return ZstdCodec(level=3)


def encode_zarr_shard(spec: StoreSpec, level: LevelSpec, rows: np.ndarray[Any, Any]) -> bytes:
    """The bytes of one Zarr shard: a pure function of its rows.

    Args:
        spec: gives rows per Zarr shard.
        level: gives grid and dtype.
        rows: integers [n, *grid] with 1 <= n <= rows_per_shard; the rest is fill.

    Raises:
        CodesError: a code outside 0..K-1, or rows of another shape.
    """
    if rows.shape[1:] != level.grid or not 1 <= len(rows) <= spec.rows_per_shard:
        raise CodesError(
            f"level {level.name!r}: expected 1..{spec.rows_per_shard} rows of grid {level.grid}, got shape {rows.shape}."
        )
    if rows.dtype.kind not in "iu":
        raise CodesError(f"level {level.name!r}: expected integers, got {rows.dtype}.")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= level.codebook_size:
        raise CodesError(
            f"level {level.name!r}: the tokenizer gave code {high if low >= 0 else low}, valid are 0..{level.codebook_size - 1}."
        )
    return _encoded(level_array(spec, level, len(rows)), rows.astype(level.dtype))


def smallest_codec(spec: StoreSpec, codes: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """The codec that makes the levels of one Zarr shard smallest; blosc-lz4, whose chunks decode fastest, when it is nearly that.

    Args:
        spec: the store's specification; its own codec has no part in this.
        codes: by level, integers [n, *grid], as for `encode_zarr_shard`.
    """
    sizes = {
        codec: sum(
            len(encode_zarr_shard(replace(spec, codec=codec), level, codes[level.name])) for level in spec.levels
        )
        for codec in CODECS
    }
    smallest = min(CODECS, key=sizes.__getitem__)
    return FASTEST if sizes[FASTEST] <= NEARLY * sizes[smallest] else smallest


def decode_zarr_shard(spec: StoreSpec, level: LevelSpec, data: bytes, rows: int) -> np.ndarray[Any, Any]:
    """The first rows of one Zarr shard from its bytes: what `encode_zarr_shard` was given, in the stored dtype."""
    array = level_array(spec, level, rows)
    sync(array.store.set("/".join(["c", *["0"] * array.ndim]), default_buffer_prototype().buffer.from_bytes(data)))
    return np.asarray(array[:])


def encode_label_shard(spec: StoreSpec, labels: np.ndarray[Any, Any]) -> bytes:
    """The bytes of one Zarr shard of labels, int64 [n]."""
    return _encoded(label_array(spec, len(labels)), labels.astype(np.int64))


def _encoded(array: zarr.Array[Any], rows: np.ndarray[Any, Any]) -> bytes:
    array[:] = rows
    key = "/".join(["c", *["0"] * rows.ndim])
    return _stored(array, key)


def _stored(array: zarr.Array[Any], key: str) -> bytes:
    buffer = sync(array.store.get(key, default_buffer_prototype()))
    assert buffer is not None, f"zarr kept nothing under {key}"
    return buffer.to_bytes()


def array_metadata(spec: StoreSpec) -> dict[str, bytes]:
    """Each array's `zarr.json` for the rows that the specification counts, by its path in the store."""
    arrays = {level.name: level_array(spec, level, spec.num_rows) for level in spec.levels}
    arrays[LABEL] = label_array(spec, spec.num_rows)
    return {f"{name}/zarr.json": _stored(array, "zarr.json") for name, array in arrays.items()}


def group_metadata(spec: StoreSpec) -> bytes:
    """The group's `zarr.json`, the file that readers trust."""
    return canonical_json(
        {"zarr_format": 3, "node_type": "group", "attributes": {"vqmill": sealed(spec.to_attributes())}}
    )


def read_spec(store: Where) -> StoreSpec:
    """Reads the group's `zarr.json`.

    Raises:
        CodesError: not a folder, no store, too large, not JSON, or not one of ours.
    """
    place = place_of(store)
    if isinstance(place, Folder) and not (place.path / GROUP).is_file():
        raise wrong_place(place.path, "store")
    try:
        data = read_file(place, GROUP, MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise UsageError(f"{place.name}: no code store there (it has no zarr.json).") from error
    except OSError as error:
        raise CodesError(f"{place.name}: zarr.json cannot be read ({error}).") from error
    except CodesError as error:
        raise CodesError(f"{place.name}/zarr.json: {error}.") from error
    return _spec_of(data, place)


def find_spec(store: Where) -> StoreSpec | None:
    """The same, or None where there is no `zarr.json`.

    Raises:
        CodesError: it is not one of ours, or cannot be read.
    """
    place = place_of(store)
    if isinstance(place, Folder):
        return read_spec(place) if (place.path / GROUP).exists() else None
    try:
        return _spec_of(read_file(place, GROUP, MAX_METADATA_BYTES), place)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"{place.name}/{GROUP}: cannot be read: {error}") from error


def _spec_of(data: bytes, place: Place) -> StoreSpec:
    try:
        metadata: JsonValue = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodesError(f"{place.name}/zarr.json: not JSON ({error}). Restore it from a copy.") from error
    attributes: JsonValue = metadata.get("attributes") if isinstance(metadata, dict) else None
    ours: JsonValue = attributes.get("vqmill") if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise CodesError(
            f"{place.name}: a Zarr group, but not a vqmill code store (no attributes.vqmill in zarr.json)."
        )
    spec = StoreSpec.from_attributes(ours, place.name)
    if not _is_sealed(ours):
        raise CodesError(
            f"{place.name}/zarr.json: damaged: attributes.vqmill is not what its sha256 says. Restore it from a copy."
        )
    return spec


def _is_sealed(value: dict[str, Any]) -> bool:
    try:
        return sealed(value) == value
    except ValueError:  # NaN, or half a character: what no writer of ours writes
        return False


def label_column(samples: pa.Table) -> np.ndarray[Any, Any]:
    """The labels of a samples table, int64 [n]; -1 where there is none."""
    import pyarrow as pa

    return np.asarray(samples["label"].fill_null(pa.scalar(MISSING_LABEL, pa.int64())))


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as one Parquet file: the same bytes for the same rows, however they were put together."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd")  # pyright: ignore[reportUnknownMemberType]
    return sink.getvalue().to_pybytes()
