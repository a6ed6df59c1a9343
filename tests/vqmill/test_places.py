"""Stores in an S3 bucket, read with range requests from a real server process; and what may not be opened on a disk."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import obstore
import pytest
import zarr

import vqmill
from vqmill import CodesError
from vqmill import bucket as bucket_module
from vqmill.bucket import Bucket
from vqmill.places import Folder, read_file


@pytest.fixture
def bucket(s3, finished_store):
    """The bucket, which holds the finished store as codes.zarr."""
    s3.upload(finished_store, "s3://corpora/codes.zarr")
    return Bucket("s3://corpora")


def test_a_store_in_a_bucket_reads_as_on_the_disk(bucket, finished_store):
    here, there = vqmill.open_codes(finished_store), vqmill.open_codes("s3://corpora/codes.zarr")
    assert there.spec == here.spec
    assert "s3://corpora/codes.zarr" in repr(there)
    for name in here.levels:
        np.testing.assert_array_equal(there[name][:], here[name][:])
        np.testing.assert_array_equal(there[name][[20, 3]], here[name][[20, 3]])
    assert there.labels.tolist() == here.labels.tolist()
    assert there.samples(5, 19) == here.samples(5, 19)
    assert there.sample_keys() == here.sample_keys()
    assert there.quarantine() == here.quarantine()
    assert there.select(labels=[3, 7]).tolist() == [3, 7]
    for mine, theirs in zip(here.batches(4, shuffle=True), there.batches(4, shuffle=True), strict=True):
        for name, values in mine.items():
            np.testing.assert_array_equal(theirs[name], values)
    with pytest.raises(CodesError, match="on a disk only"):
        _ = there.path


def test_one_row_takes_one_range_not_the_file(bucket, monkeypatch):
    asked = []
    original = Bucket.get_range
    monkeypatch.setattr(
        Bucket,
        "get_range",
        lambda self, file, start, length: asked.append((file, length)) or original(self, file, start, length),
    )
    codes = vqmill.open_codes("s3://corpora/codes.zarr")
    asked.clear()
    codes["top"][3]
    codes["top"][4]
    size = len(obstore.get(bucket.store, "codes.zarr/top/c/0/0/0").bytes())
    assert [file for file, _ in asked] == ["top/c/0/0/0"] * 2  # the index, then a chunk, once
    assert sum(length for _, length in asked) <= size


@pytest.fixture
def chunky(s3, stores, address, tmp_path, monkeypatch):
    """A store of four rows a chunk on the disk and in the bucket, 64 rows in four Zarr shards, with the gets of its ranges."""
    monkeypatch.setattr("vqmill.spec.CHUNK_BYTES", 60)
    spec = replace(stores.two_levels, rows_per_shard=16)
    here = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 64))
    asked = []
    original = Bucket.get_ranges
    monkeypatch.setattr(
        Bucket,
        "get_ranges",
        lambda self, file, starts, sizes: asked.append((file, len(starts))) or original(self, file, starts, sizes),
    )
    return here, s3.upload(here, f"{address}/codes.zarr"), asked


def test_chunks_that_are_read_together_are_asked_for_together(chunky):
    here, there, asked = chunky
    codes = vqmill.open_codes(there)
    expected = vqmill.open_codes(here)["top"][:]
    assert codes["top"]._reader.chunk_rows < 16
    np.testing.assert_array_equal(codes["top"][:], expected)
    chunks = 16 // codes["top"]._reader.chunk_rows
    assert sorted(asked) == [(f"top/c/{shard}/0/0", chunks) for shard in range(4)]
    scattered = [60, 61, 62, 63, 3, 2, 1, 0, 33]
    np.testing.assert_array_equal(codes["top"][scattered], expected[scattered])


def test_a_damaged_chunk_among_many_is_named_and_the_others_are_read(chunky):
    here, there, _ = chunky
    place, name = Bucket(there), "top/c/1/0/0"
    data = bytearray(place.get(name)[0])
    rows = vqmill.open_codes(here)["top"]._reader.chunk_rows
    start, size = np.frombuffer(data[-16 * (16 // rows) - 4 : -4], "<u8").reshape(-1, 2)[1].tolist()
    data[start + size // 2] ^= 1
    place.write(name, bytes(data))
    place.delete(["top/c/3/0/0"])
    codes = vqmill.open_codes(there)
    for stop, bad in ((64, f"{16 + rows}..{16 + 2 * rows - 1}"), (32, f"{16 + rows}..")):
        with pytest.raises(CodesError, match=rf"'top' cannot be read in rows {re.escape(bad)}"):
            codes["top"][:stop]
    with pytest.raises(CodesError, match=r"rows 48\.\..*no such object"):
        codes["top"][32:]
    np.testing.assert_array_equal(codes["top"][32:48], vqmill.open_codes(here)["top"][32:48])


def test_what_is_missing_or_damaged_is_named(bucket, finished_store):
    with pytest.raises(CodesError, match=r"s3://corpora/nothing\.zarr: no code store there"):
        vqmill.open_codes("s3://corpora/nothing.zarr")
    for file in finished_store.rglob("*"):
        if file.is_file():
            name = file.relative_to(finished_store).as_posix()
            data = file.read_bytes()[:-30] if name == "bottom/c/1/0/0" else file.read_bytes()
            if name != "top/c/2/0/0":
                obstore.put(bucket.store, f"hurt.zarr/{name}", data)
    codes = vqmill.open_codes("s3://corpora/hurt.zarr")
    codes["bottom"][:8], codes["bottom"][16:]
    with pytest.raises(CodesError, match=r"'bottom' cannot be read in rows 8\.\.15.*cut short"):
        codes["bottom"][9]
    with pytest.raises(CodesError, match=r"'top' cannot be read in rows 16\.\.23.*no such object"):
        codes["top"][16]
    with pytest.raises(CodesError, match="no such object"):
        list(codes.batches(4))


def test_other_codecs_in_a_bucket_are_read_by_zarr(bucket, store, stores):
    shutil.rmtree(store / "top")
    array = zarr.create_array(
        store / "top",
        shape=(21, 2, 3),
        shards=(8, 2, 3),
        chunks=(2, 2, 3),
        dtype="uint16",
        fill_value=65535,
        compressors=None,
    )
    array[:] = stores.codes(stores.two_levels, 21)["top"]
    for file in store.rglob("*"):
        if file.is_file():
            obstore.put(bucket.store, f"other.zarr/{file.relative_to(store).as_posix()}", file.read_bytes())
    found = vqmill.open_codes("s3://corpora/other.zarr", any_layout=True)["top"][:]
    np.testing.assert_array_equal(found, stores.codes(stores.two_levels, 21)["top"])


def test_no_message_holds_a_secret(bucket, s3, monkeypatch):
    monkeypatch.setattr(bucket_module, "RETRY", {"max_retries": 1})
    messages = [repr(vqmill.open_codes("s3://corpora/codes.zarr"))]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CodesError) as unreachable:
        vqmill.open_codes("s3://corpora/codes.zarr")
    messages.append(str(unreachable.value))
    for address in (
        f"s3://someone:{s3.secret}@corpora/codes.zarr?token={s3.secret}",
        f"ftp://x:{s3.secret}@host/a",
        f"https://x:{s3.secret}@127.0.0.1:9/codes.zarr",
    ):
        with pytest.raises(CodesError) as error:
            vqmill.open_codes(address)
        messages.append(str(error.value))
    assert not any(s3.secret in message for message in messages), messages


def test_without_obstore_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(CodesError, match=r"pip install 'vqmill\[s3\]'"):
        vqmill.open_codes("s3://corpora/codes.zarr")


@pytest.mark.parametrize("file", ["zarr.json", "top/zarr.json", "samples/part-000000.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_plain_file_is_not_read(store, file, kind):
    """Neither waits for a pipe's writer nor reads a device without end."""
    (store / file).unlink()
    if kind == "pipe":
        os.mkfifo(store / file)
    else:
        (store / file).symlink_to("/dev/zero")
    with pytest.raises(CodesError):
        vqmill.open_codes(store).samples()


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CodesError, match="1,099,511,627,776 bytes, expected at most 1,000"):
        read_file(Folder(tmp_path), "large", 1000)
