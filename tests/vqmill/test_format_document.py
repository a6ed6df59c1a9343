"""docs/format.md is enough to read a store: this reader was written from it, and uses nothing of ours."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numcodecs import blosc, zstd

import vqmill
from vqmill import LevelSpec, StoreSpec
from vqmill.chunks import CRC_BYTES, OVERHEAD_BYTES
from vqmill.layout import MAX_METADATA_BYTES, array_metadata
from vqmill.spec import (
    CHUNK_BYTES,
    CODECS,
    FORMAT_VERSION,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS_PER_SHARD,
    MAX_ROW_BYTES,
    MAX_ROWS,
    MAX_ROWS_PER_SHARD,
    MAX_SHARD_BYTES,
    SHARD_BYTES,
    Segment,
)
from vqmill.stored import MAX_ARRAY_METADATA_BYTES
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA

GOLDEN = sorted((Path(__file__).parent / "golden" / f"v{FORMAT_VERSION}").glob("*.zarr"))
DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def check_seal(value):
    content = {key: item for key, item in value.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == value["sha256"]


def read_by_the_document(store):
    """Codes by level, labels and tables of a store, each checked as "How to read a store" says."""
    group = json.loads((store / "zarr.json").read_bytes())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    head = group["attributes"]["vqmill"]
    check_seal(head)
    assert head["format_version"] == 1
    assert head["complete"] is True
    rows, rows_per_shard = head["num_rows"], head["rows_per_shard"]
    arrays = {}
    for level in head["levels"]:
        array = zarr.open_array(store / level["name"], mode="r", zarr_format=3)
        size = level["codebook_size"]
        dtype = "uint8" if size <= 255 else "uint16" if size <= 65_535 else "uint32"
        assert array.dtype == dtype
        assert array.shape[1:] == tuple(level["grid"])
        assert array.shape[0] >= rows
        assert array.fill_value == np.iinfo(dtype).max
        assert array.shards == (rows_per_shard, *level["grid"])
        assert rows_per_shard % array.chunks[0] == 0
        assert list(array.metadata.dimension_names) == level["axes"]
        arrays[level["name"]] = array[:rows]
        assert arrays[level["name"]].max() < size
    labels = zarr.open_array(store / "label", mode="r", zarr_format=3)[:rows]
    samples, quarantine, first_row = [], [], 0
    for shard in range(head["num_commits"]):
        record = json.loads((store / f"commits/shard-{shard:06d}.json").read_bytes())
        assert (record["shard"], record["first_row"]) == (shard, first_row)
        check_seal(record)
        for name, facts in record["files"].items():
            data = (store / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"])
        samples += pq.read_table(store / f"samples/part-{shard:06d}.parquet", partitioning=None).to_pylist()
        quarantine += pq.read_table(store / f"quarantine/part-{shard:06d}.parquet", partitioning=None).to_pylist()
        first_row += record["rows"]
    assert first_row == rows == len(samples)
    assert labels.tolist() == [-1 if row["label"] is None else row["label"] for row in samples]
    return arrays, samples, quarantine


def read_level_by_the_document(store, name):
    """The codes of a level, chunk by chunk, as "Inside a Zarr shard" says: with decoders of Blosc and Zstandard, and without Zarr."""
    head = json.loads((store / "zarr.json").read_bytes())["attributes"]["vqmill"]
    array = json.loads((store / name / "zarr.json").read_bytes())
    sharding = array["codecs"][0]["configuration"]
    chunk_shape = sharding["chunk_shape"]
    decompress = {"blosc": blosc.decompress, "zstd": zstd.decompress}[sharding["codecs"][1]["name"]]
    dtype = np.dtype(array["data_type"]).newbyteorder("<")
    num_chunks = head["rows_per_shard"] // chunk_shape[0]
    rows = []
    for shard in range(-(-head["num_rows"] // head["rows_per_shard"])):
        data = (store / name / "/".join(["c", str(shard), *"0" * (len(chunk_shape) - 1)])).read_bytes()
        index, checksum = data[-16 * num_chunks - 4 : -4], data[-4:]
        assert google_crc32c.value(index) == int.from_bytes(checksum, "little")
        for offset, size in struct.iter_unpack("<QQ", index):
            if (offset, size) == (2**64 - 1, 2**64 - 1):
                rows.append(np.full(chunk_shape, array["fill_value"], dtype))
                continue
            chunk = data[offset : offset + size]
            assert google_crc32c.value(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
            rows.append(np.frombuffer(decompress(chunk[:-4]), dtype).reshape(chunk_shape))
    values = np.concatenate(rows)
    assert (values[head["num_rows"] :] == array["fill_value"]).all()
    return values[: head["num_rows"]]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_a_reader_written_from_the_document_reads_golden_stores(golden):
    arrays, samples, quarantine = read_by_the_document(golden)
    codes = vqmill.open_codes(golden)
    assert arrays.keys() == set(codes.levels)
    for name in codes.levels:
        for values in (arrays[name], read_level_by_the_document(golden, name)):
            np.testing.assert_array_equal(values, codes[name][:])
    np.testing.assert_array_equal(read_level_by_the_document(golden, "label"), codes.labels)
    assert (samples, quarantine) == (codes.samples().to_pylist(), codes.quarantine().to_pylist())


def test_the_golden_stores_have_all_that_the_document_speaks_of():
    heads = [json.loads((path / "zarr.json").read_bytes())["attributes"]["vqmill"] for path in GOLDEN]
    assert {head["codec"] for head in heads} == set(CODECS)
    missing = (2**64 - 1).to_bytes(8, "little") * 2
    assert any(missing in file.read_bytes() for path in GOLDEN for file in path.glob("*/c/**/0") if file.is_file())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("codebook_size", [512, 70_000])
def test_every_codec_is_documented_with_its_json(codec, codebook_size):
    (text,) = re.findall(rf"^\| `{codec}` \| `(.*)` \|$", DOCUMENT, re.MULTILINE)
    expected = json.loads(text)
    level = LevelSpec("codes", codebook_size, (4, 4))
    if "typesize" in expected["configuration"]:
        expected["configuration"]["typesize"] = level.dtype.itemsize
    files = array_metadata(StoreSpec((level,), 4, {}, codec=codec))
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    for name, compressor in (("codes", expected), ("label", None)):
        (sharding,) = json.loads(files[f"{name}/zarr.json"])["codecs"]
        first, found, last = sharding["configuration"]["codecs"]
        assert (first, last) == (endian, {"name": "crc32c"})
        if compressor:
            assert found == compressor
        else:
            assert found["configuration"] == {
                "typesize": 8, "cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "blocksize": 0,
            }  # fmt: skip
        assert sharding["configuration"]["index_codecs"] == [endian, {"name": "crc32c"}]
        assert sharding["configuration"]["index_location"] == "end"


def test_a_reader_written_from_the_document_reads_a_store(store, stores):
    arrays, samples, quarantine = read_by_the_document(store)
    for name, values in stores.codes(stores.two_levels, 21).items():
        np.testing.assert_array_equal(arrays[name], values)
    assert [row["key"] for row in samples] == [f"class/sample-{row}" for row in range(21)]
    assert [row["reason"] for row in quarantine] == ["truncated"] * 3


def test_the_snippet_of_the_document_runs(store, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    monkeypatch.chdir(store.parent)
    scope: dict[str, object] = {}
    exec(compile(snippet, "docs/format.md", "exec"), scope)
    assert scope["codes"].shape == (21, 2, 3)
    assert scope["samples"].num_rows == 21


def json_examples():
    return [json.loads(text) for text in re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)]


def shape_of(value):
    """The keys of a JSON value, nested; lists by their first element; free mappings by name only."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    return [shape_of(value[0])] if isinstance(value, list) and value else type(value).__name__


def test_the_examples_have_the_keys_that_stores_have(tmp_path, stores):
    group, array, commit = json_examples()
    spec = replace(stores.two_levels, segments=(Segment("0" * 64),))
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 9))
    written = json.loads((path / "zarr.json").read_bytes())
    for free in ("tokenizer", "preprocessing", "corpus"):
        assert isinstance(group["attributes"]["vqmill"].pop(free), dict)
        written["attributes"]["vqmill"].pop(free)
    assert shape_of(group) == shape_of(written)
    assert shape_of(array) == shape_of(json.loads((path / "top/zarr.json").read_bytes()))
    record = json.loads((path / "commits/shard-000000.json").read_bytes())
    assert commit.pop("files").keys() == record["files"].keys()
    record.pop("files")
    assert shape_of(commit) == shape_of(record)


def test_the_array_example_is_what_is_written_for_its_sizes(tmp_path, stores):
    """The example is `top` of a store of 512 codes on a 32 x 32 grid."""
    _, example, _ = json_examples()
    spec = StoreSpec((LevelSpec("top", 512, (32, 32)),), 4096, {}, num_rows=example["shape"][0], num_commits=3)
    assert json.loads(array_metadata(spec)["top/zarr.json"]) == example


@pytest.mark.parametrize("schema", [SAMPLES_SCHEMA, QUARANTINE_SCHEMA], ids=["samples", "quarantine"])
def test_every_column_is_documented_with_its_type(schema):
    for column in schema:
        kind = f"{column.type}" + ("" if not column.nullable else ", may be missing")
        assert re.search(rf"\| `{column.name}` \| {kind} \|", DOCUMENT), column


def test_the_numbers_of_the_document_are_the_code_s():
    assert f"format_version` {FORMAT_VERSION}" in DOCUMENT
    assert f"{CHUNK_BYTES:,} bytes" in DOCUMENT
    assert f"{SHARD_BYTES:,} bytes" in DOCUMENT
    assert f"{MAX_ROWS_PER_SHARD:,} rows" in DOCUMENT
    for row, number in (
        ("commit record", MAX_METADATA_BYTES),
        ("json` of an array", MAX_ARRAY_METADATA_BYTES),
        ("row of one level", MAX_ROW_BYTES),
        ("Zarr shard of one array", MAX_SHARD_BYTES),
        ("chunk with more than one row", MAX_CHUNK_BYTES),
        ("chunks of a Zarr shard", MAX_CHUNKS_PER_SHARD),
        ("labels of a Zarr shard", MAX_CHUNK_BYTES // 8),
        ("rows of a store", MAX_ROWS),
        ("encoded chunk", OVERHEAD_BYTES),
    ):
        assert re.search(rf"^\| .*{row}.* \| .*{number:,}.* \|$", DOCUMENT, re.MULTILINE), row
    assert f"and {CRC_BYTES} |" in DOCUMENT
