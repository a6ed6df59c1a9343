"""`verify_store`: silent on a good store, and names what is wrong with a bad one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from vqmill import CodesError, LevelSpec, StoreSpec
from vqmill.layout import encode_label_shard, encode_zarr_shard
from vqmill.tables import SAMPLES_SCHEMA
from vqmill.usage import perplexity
from vqmill.verify import verify_store
from vqmill.writer import Counts


def test_nothing_is_wrong_with_a_good_store(store, stores):
    calls = []
    found = verify_store(store, progress=lambda done, total: calls.append((done, total)))
    assert found.problems == ()
    assert found.rows == 21
    assert found.counts == Counts(encoded=21, quarantined=3)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    data = [size for name, size in ((n, len(d)) for n, d in stores.files(store).items()) if "json" not in name]
    assert found.bytes_read == sum(data)
    for name, values in stores.codes(stores.two_levels, 21).items():
        histogram = np.bincount(values.reshape(-1))
        assert found.used_codes[name] == np.count_nonzero(histogram)
        share = histogram[histogram > 0] / histogram.sum()
        assert found.perplexity[name] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize(
    ("histogram", "expected"), [([0, 0], 0.0), ([7], 1.0), ([1, 1, 1, 1], 4.0), ([3, 0, 3], 2.0), ([2, 1, 1], 2**1.5)]
)
def test_perplexity(histogram, expected):
    assert perplexity(np.array(histogram)) == pytest.approx(expected)


DATA_FILES = [
    "top/c/0/0/0",
    "bottom/c/2/0/0",
    "label/c/1",
    "samples/part-000001.parquet",
    "quarantine/part-000002.parquet",
]
JSON_FILES = ["zarr.json", "top/zarr.json", "label/zarr.json", "commits/shard-000001.json"]


def complaints(store):
    """What verify says, whether as problems or because the store cannot be opened at all."""
    try:
        return "\n".join(map(str, verify_store(store).problems))
    except CodesError as error:
        return str(error)


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_flipped_byte_in_a_data_file_is_found_wherever_it_is(store, name):
    data = (store / name).read_bytes()
    for place in {0, 4, len(data) // 3, len(data) // 2, len(data) - 5, len(data) - 1}:
        flipped = bytearray(data)
        flipped[place] ^= 1
        (store / name).write_bytes(flipped)
        found = verify_store(store).problems
        assert len(found) == 1
        assert found[0].kind == "damaged"
        assert found[0].file == name
        assert found[0].rows == (8 * found[0].shards[0], min(20, 8 * found[0].shards[0] + 7))


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_flipped_byte_in_metadata_is_found_wherever_it_is(store, name):
    data = (store / name).read_bytes()
    missed = []
    for place in range(0, len(data), max(1, len(data) // 45)):
        flipped = bytearray(data)
        flipped[place] ^= 1
        (store / name).write_bytes(flipped)
        if not complaints(store):
            missed.append(data[max(0, place - 15) : place + 5])
    assert missed == []


@pytest.mark.parametrize("key", ["encoded", "quarantined", "skipped", "input_shard", "span", "row", "bytes"])
def test_a_changed_number_in_a_commit_record_is_found(store, stores, key):
    def change(record):
        for part in (record["counts"], record["cursor"], record["files"]["top/c/1/0/0"]):
            if key in part:
                part[key] += 1

    stores.edit_json(store / "commits/shard-000001.json", change, seal=False)
    assert "shard-000001" in complaints(store) or "top/c/1/0/0" in complaints(store)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 7},
        {"first_row": 9},
        {"shard": 2},
        {"files": {"x": {}}},
        {"files": {}},
        {"counts": {}},
        {"cursor": {}},
        {"cursor": {"input_shard": "x", "span": 0, "row": 0}},
    ],
    ids=str,
)
def test_a_wrong_commit_record_is_found(store, stores, change):
    stores.edit_json(store / "commits/shard-000001.json", lambda record: record.update(change))
    assert complaints(store)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000])
def test_an_unreadable_commit_record_is_found(store, content):
    (store / "commits/shard-000001.json").write_bytes(content)
    assert "shard-000001.json" in complaints(store)


@pytest.mark.parametrize("name", [*DATA_FILES, *JSON_FILES])
def test_a_missing_file_is_found(store, name):
    (store / name).unlink()
    found = complaints(store)
    assert name in found or f"'{name.split('/')[0]}'" in found or "not a code store" in found


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_file_cut_short_is_found(store, name, keep):
    data = (store / name).read_bytes()
    (store / name).write_bytes(data[: int(len(data) * keep)])
    assert name in complaints(store)


@pytest.mark.parametrize("name", ["stray", "top/c/3/0/0", "samples/part-000003.parquet", "top/c/0/0/0.ab.partial"])
def test_a_stray_file_is_found(store, name):
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_bytes(b"x")
    (problem,) = verify_store(store).problems
    assert (problem.kind, problem.file) == ("leftover", name)


def test_all_damage_is_listed_not_the_first_alone(store):
    (store / "top/c/0/0/0").unlink()
    (store / "bottom/c/2/0/0").write_bytes(b"x")
    (store / "stray").write_bytes(b"x")
    assert len(verify_store(store).problems) == 3


def test_an_unfinished_store_is_a_problem(tmp_path, stores):
    spec = stores.two_levels
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21), stop_after=2)
    found = verify_store(path)
    assert [problem.kind for problem in found.problems] == ["unfinished"]
    assert found.damage == ()


def replace_codes(stores, store, rows):
    """Writes rows into Zarr shard 1 of `top` behind vqmill's back, and commits them."""
    spec = stores.two_levels
    wide = LevelSpec("top", 65_535, (2, 3))
    data = encode_zarr_shard(replace(spec, levels=(wide,)), wide, rows)
    (store / "top/c/1/0/0").write_bytes(data)
    stores.recommit(store, 1, "top/c/1/0/0")


def test_codes_beyond_the_codebook_are_found(store, stores):
    rows = stores.codes(stores.two_levels, 21)["top"][8:16]
    rows[3, 1, 2] = 512
    replace_codes(stores, store, rows)
    found = complaints(store)
    assert "(level 'top', Zarr shard 1, row 11, " in found
    assert "holds code 512 at row 11, but" in found
    assert "codebook_size is 512 (valid 0..511)" in found


def test_codes_written_by_zarr_python_are_checked_too(tmp_path, stores):
    spec = StoreSpec((LevelSpec("codes", 16, (2, 2)),), 4, {})
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 6))
    zarr.open_array(path / "codes", mode="r+")[5, 1, 1] = 16
    assert "codes/c/1/0/0" in complaints(path)
    stores.recommit(path, 1, "codes/c/1/0/0")
    assert "holds code 16" in complaints(path)


def test_labels_that_differ_from_the_samples_are_found(store, stores):
    labels = np.arange(8, 16)
    (store / "label/c/1").write_bytes(encode_label_shard(stores.two_levels, labels))
    stores.recommit(store, 1, "label/c/1")
    (problem,) = verify_store(store).problems
    assert (problem.kind, problem.array, problem.shards, problem.rows) == ("content", "label", (1, 1), (9, 14))
    assert "differs from the samples table" in str(problem)


@pytest.mark.parametrize("kind", ["short", "columns", "garbage"])
@pytest.mark.parametrize("table", ["samples", "quarantine"])
def test_a_wrong_table_is_found_even_with_a_matching_record(store, stores, kind, table):
    name = f"{table}/part-000001.parquet"
    if kind == "garbage":
        (store / name).write_bytes(b"PAR1 nothing PAR1")
    else:
        whole = pq.read_table(store / name, partitioning=None)
        pq.write_table(whole.slice(1) if kind == "short" else pa.table({"x": [1] * whole.num_rows}), store / name)
    stores.recommit(store, 1, name)
    assert name in [problem.file for problem in verify_store(store).problems]


def test_a_zarr_shard_that_cannot_be_decoded_is_found_even_with_a_matching_record(store, stores):
    for name in ("top/c/1/0/0", "label/c/1"):
        data = bytearray((store / name).read_bytes())
        data[4] ^= 1
        (store / name).write_bytes(data)
        stores.recommit(store, 1, name)
    problems = complaints(store)
    assert "Zarr shard 1" in problems
    assert "'top'" in problems
    assert "'label'" in problems


def test_a_record_that_leaves_out_a_file_is_found(store, stores):
    def change(record):
        del record["files"]["top/c/1/0/0"]

    stores.edit_json(store / "commits/shard-000001.json", change)
    assert "top/c/1/0/0" in complaints(store)


def test_a_record_never_leads_out_of_the_store(store, stores, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    facts = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    stores.edit_json(store / "commits/shard-000001.json", lambda record: record["files"].update({"../secret": facts}))
    assert "../secret" in complaints(store)


def test_metadata_is_compared_by_meaning(store):
    """Another zarr-python may write the same metadata with other spaces or key order."""
    for file in (store / "top/zarr.json", store / "zarr.json"):
        file.write_text(json.dumps(json.loads(file.read_bytes()), sort_keys=True))
    assert complaints(store) == ""


def test_a_changed_codec_or_fill_in_metadata_is_found(store, stores):
    stores.edit_json(store / "top/zarr.json", lambda metadata: metadata.update(fill_value=0))
    assert "top" in complaints(store)


def test_the_samples_schema_is_the_documented_one():
    assert SAMPLES_SCHEMA.field("label").nullable
    assert not SAMPLES_SCHEMA.field("key").nullable
