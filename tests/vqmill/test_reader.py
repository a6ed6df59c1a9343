"""The fast reader: equal to zarr-python where it reads, refusing what is damaged or hostile before memory is taken."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs import Zstd, blosc

import vqmill
from vqmill import CodesError
from vqmill.chunks import MISSING, ChunkLayout, decode_chunk
from vqmill.files import write_whole
from vqmill.layout import array_metadata, encode_zarr_shard, group_metadata
from vqmill.reader import OPEN_SHARDS, RowReader
from vqmill.spec import CODECS, LevelSpec, StoreSpec

pytestmark = pytest.mark.usefixtures("both_ways")

SHARD = "top/c/1/0/0"


def with_crc(data):
    return np.frombuffer(data + google_crc32c.value(data).to_bytes(4, "little"), np.uint8)


def rewrite_shard(store, name, change):
    """Lets `change` alter chunks (bytes with their CRC) and the index (pairs) of a Zarr shard; the index's own CRC is mended."""
    data = (store / name).read_bytes()
    chunks = json.loads((store / name.split("/")[0] / "zarr.json").read_bytes())
    inner = chunks["codecs"][0]["configuration"]["chunk_shape"][0]
    count = chunks["chunk_grid"]["configuration"]["chunk_shape"][0] // inner
    body, index = bytearray(data[: -16 * count - 4]), np.frombuffer(data[-16 * count - 4 : -4], "<u8").copy()
    index = index.reshape(-1, 2)
    body, index = change(body, index) or (body, index)
    packed = index.astype("<u8").tobytes()
    (store / name).write_bytes(bytes(body) + packed + google_crc32c.value(packed).to_bytes(4, "little"))


@pytest.fixture
def many_chunks(tmp_path, stores, monkeypatch):
    """A store with four chunks in each Zarr shard of eight rows."""
    monkeypatch.setattr("vqmill.spec.CHUNK_BYTES", 30)
    return stores.write(tmp_path / "many.zarr", stores.two_levels, stores.codes(stores.two_levels, 21), list(range(21)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("codebook_size", [200, 512, 70_000])
def test_rows_equal_zarrs_for_every_codec_and_dtype(tmp_path, stores, monkeypatch, codec, codebook_size):
    monkeypatch.setattr("vqmill.spec.CHUNK_BYTES", 600)
    spec = replace(
        stores.two_levels, levels=(LevelSpec("codes", codebook_size, (3, 4, 5)),), codec=codec, rows_per_shard=20
    )
    rows = stores.codes(spec, 53)
    path = stores.write(tmp_path / "codes.zarr", spec, rows)
    monkeypatch.setattr("vqmill.stored.ZarrArray", None)  # no falling back
    codes = vqmill.open_codes(path)
    found = zarr.open_array(path / "codes", mode="r", zarr_format=3)[:]
    np.testing.assert_array_equal(codes["codes"][:], found)
    np.testing.assert_array_equal(codes["codes"][::-3], rows["codes"][::-3])
    some = np.random.default_rng(0).permutation(53)[:17]
    np.testing.assert_array_equal(codes["codes"][some], rows["codes"][some])


def test_other_arrangements_of_known_codecs_are_read_by_zarr(store, stores):
    """Without the inner CRC, with the index in front, without sharding: not what our writers do, and right all the same, when asked for."""
    expected = stores.codes(stores.two_levels, 21)["top"]
    in_front = {"shape": (8, 2, 3), "index_location": "start"}
    arrangements = (
        {"shards": (8, 2, 3), "chunks": (2, 2, 3), "compressors": [zarr.codecs.ZstdCodec()]},
        {"shards": (8, 2, 3), "chunks": (2, 2, 3), "compressors": None},
        {"shards": in_front, "chunks": (2, 2, 3)},
        {"chunks": (8, 2, 3)},
    )
    for options in arrangements:
        shutil.rmtree(store / "top")
        array = zarr.create_array(
            store / "top",
            shape=(21, 2, 3),
            dtype="uint16",
            fill_value=65535,
            dimension_names=("row", "y", "x"),
            **options,
        )
        array[:] = expected
        with pytest.raises(CodesError, match=r"'top' are not arranged.*any_layout=True"):
            vqmill.open_codes(store)
        codes = vqmill.open_codes(store, any_layout=True)
        np.testing.assert_array_equal(codes["top"][:], expected)
        np.testing.assert_array_equal(codes["top"][[20, 3]], expected[[20, 3]])
        assert sorted(row for batch in codes.batches(4, shuffle=True) for row in batch["row"].tolist()) == list(
            range(21)
        )
    shutil.rmtree(store / "top/c")
    with pytest.raises(CodesError, match="'top'"):
        vqmill.open_codes(store, any_layout=True)["top"][3]


def test_a_damaged_file_behind_the_slow_path_is_named(store):
    shutil.rmtree(store / "top")
    array = zarr.create_array(store / "top", shape=(21, 2, 3), chunks=(8, 2, 3), dtype="uint16", fill_value=65535)
    array[:] = np.zeros((21, 2, 3), np.uint16)
    (store / "top/c/1/0/0").write_bytes(b"not zstd")
    codes = vqmill.open_codes(store, any_layout=True)
    assert codes["top"][:8].max() == 0
    with pytest.raises(CodesError, match=r"'top' cannot be read in rows 8\.\.15"):
        codes["top"][8]
    (store / "top/c/2/0/0").rename(store.parent / "outside")
    (store / "top/c/2/0/0").symlink_to(store.parent / "outside")
    with pytest.raises(CodesError, match="symbolic link"):
        codes["top"][16]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda codes: pickle.loads(pickle.dumps(codes))])
def test_a_copy_of_an_open_store_has_files_of_its_own(store, stores, copied):
    codes = vqmill.open_codes(store)
    codes["top"][3]
    other = copied(codes)
    assert other["top"][:].tolist() == stores.codes(stores.two_levels, 21)["top"].tolist()
    del other
    assert codes["top"][12:].tolist() == stores.codes(stores.two_levels, 21)["top"][12:].tolist()
    with pytest.raises(TypeError):
        copied(codes["top"]) if copied is not copy.copy else copy.deepcopy(codes["top"])


def test_many_threads_read_one_store(many_chunks, stores):
    codes, expected = vqmill.open_codes(many_chunks), stores.codes(stores.two_levels, 21)["bottom"]

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, 21, 50)
        return all(codes["bottom"][int(row)].tolist() == expected[row].tolist() for row in rows)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(16)))


@pytest.mark.parametrize(("rows_per_shard", "chunk"), [(2**21, 2**20), (100_000, 1)])
def test_chunks_that_would_take_much_memory_are_refused(tmp_path, rows_per_shard, chunk):
    """The metadata asks for 2 GiB in a chunk, or for an index of 100,000 chunks."""
    spec = StoreSpec((LevelSpec("codes", 512, (32, 32)),), 1, {"fingerprint": "none"}, codec="blosc-zstd")
    spec = (
        replace(spec, levels=(LevelSpec("codes", 512, (32, 16)),), rows_per_shard=rows_per_shard)
        if chunk > 1
        else replace(spec, levels=(LevelSpec("codes", 512, (2, 2)),), rows_per_shard=rows_per_shard)
    )
    spec = spec.with_progress(num_rows=8, num_commits=1, complete=True)
    for name, data in {**array_metadata(spec), "zarr.json": group_metadata(spec)}.items():
        write_whole(tmp_path / name, data)
    metadata = json.loads((tmp_path / "codes/zarr.json").read_bytes())
    metadata["codecs"][0]["configuration"]["chunk_shape"][0] = chunk
    (tmp_path / "codes/zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(CodesError, match="at most 65,536 chunks of one row or 16,777,216 bytes"):
        vqmill.open_codes(tmp_path)


@pytest.mark.parametrize("name", ["top", "bottom", "label"])
@pytest.mark.parametrize("change", ["delete", "cut", "empty", "flip", "index"])
def test_damage_is_found_and_named(many_chunks, name, change):
    path = many_chunks / name / ("c/1" if name == "label" else "c/1/0/0")
    data = bytearray(path.read_bytes())
    match change:
        case "delete":
            path.unlink()
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "flip":
            data[20] ^= 1
            path.write_bytes(data)
        case "index":
            data[-10] ^= 1
            path.write_bytes(data)
    codes = vqmill.open_codes(many_chunks)
    array = codes.label_array if name == "label" else codes[name]
    array[:8], array[16:]
    with pytest.raises(CodesError, match=rf"'{name}' cannot be read in rows (8|9|1\d)\.\.\d+: {name}/c/1"):
        array[8:16]
    with pytest.raises(CodesError, match=f"'{name}'"):
        list(codes.batches(4, shuffle=True))


def test_a_chunk_that_was_not_written_is_missing_not_fill(many_chunks):
    def forget(body, index):
        index[2] = MISSING

    rewrite_shard(many_chunks, SHARD, forget)
    codes = vqmill.open_codes(many_chunks)["top"]
    codes[8:12]
    with pytest.raises(CodesError, match="chunk 2: it is missing"):
        codes[12:14]


@pytest.mark.parametrize(
    "entry",
    [(2**40, 10), (0, 2**40), (0, 2**64 - 1), (2**64 - 2, 2**64 - 2), (2**63, 2**63), (0, 0), (0, 3), (0, 5)],
    ids=str,
)
def test_indexes_that_lie_are_refused_before_memory_is_taken(many_chunks, entry):
    def lie(body, index):
        index[2] = entry

    rewrite_shard(many_chunks, SHARD, lie)
    tracemalloc.start()
    with pytest.raises(CodesError, match="'top'"):
        vqmill.open_codes(many_chunks)["top"][12:14]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def bomb_of_blosc(raw_bytes):
    return blosc.compress(np.zeros(raw_bytes, np.uint8), b"zstd", 9)


def bomb_of_zstd(raw_bytes):
    return Zstd(level=9).encode(np.zeros(raw_bytes, np.uint8))


def zstd_without_a_size(raw_bytes):
    """A frame whose header does not tell how much it decodes to: an empty raw block and a run-length block."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, 0x88]) + ((raw_bytes << 3) | 3).to_bytes(3, "little") + b"\x00"


@pytest.mark.parametrize(
    ("codec", "bomb"), [("blosc-zstd", bomb_of_blosc), ("zstd", bomb_of_zstd), ("zstd", zstd_without_a_size)]
)
def test_chunks_that_would_decode_to_more_are_refused(tmp_path, stores, codec, bomb):
    spec = replace(stores.two_levels, codec=codec)
    store = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21))

    def plant(body, index):
        data = with_crc(bomb(100_000)).tobytes()
        index[0] = len(body), len(data)
        return body + data, index

    rewrite_shard(store, SHARD, plant)
    with pytest.raises(CodesError, match="'top' cannot be read in rows 8"):
        vqmill.open_codes(store)["top"][8]


@pytest.mark.parametrize("compressor", ["blosc", "zstd"])
def test_no_bytes_crash_the_decoder(compressor):
    """Every cut, and flips of every byte of the header, with a right CRC over them: an error or the right size, never a crash."""
    layout = ChunkLayout((4, 16, 16), np.dtype(np.uint16), 1, compressor)
    values = np.random.default_rng(0).integers(0, 300, layout.chunk_shape, np.uint16)
    data = (
        blosc.compress(values, b"zstd", 3, blosc.BITSHUFFLE) if compressor == "blosc" else Zstd(level=3).encode(values)
    )
    out = np.empty(layout.chunk_shape, layout.dtype)
    decode_chunk(with_crc(data), layout, out)
    np.testing.assert_array_equal(out, values)
    for size in [*range(40), len(data) // 2, len(data) - 1]:
        with pytest.raises(CodesError, match="damaged"):
            decode_chunk(with_crc(data[:size]), layout, out)
    for place in range(40):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with suppress(CodesError):
                decode_chunk(with_crc(bytes(changed)), layout, out)
    with pytest.raises(CodesError, match="CRC"):
        decode_chunk(np.frombuffer(bytes(data) + b"abcd", np.uint8), layout, out)
    with pytest.raises(CodesError, match="CRC"):
        decode_chunk(np.empty(3, np.uint8), layout, out)


@pytest.mark.parametrize("link", ["top/c/1/0/0", "top/c/1", "top/c", "top"])
def test_symbolic_links_are_not_followed(store, tmp_path, link):
    outside = tmp_path / "outside"
    (store / link).rename(outside)
    (store / link).symlink_to(outside)
    with pytest.raises(CodesError, match=r"symbolic link.*cp -rL"):
        vqmill.open_codes(store)["top"][8]


def test_the_store_itself_may_be_linked_to(store, stores, tmp_path):
    (tmp_path / "link.zarr").symlink_to(store)
    np.testing.assert_array_equal(
        vqmill.open_codes(tmp_path / "link.zarr")["top"][:], stores.codes(stores.two_levels, 21)["top"]
    )


def test_an_open_reader_goes_on_with_the_file_that_it_opened(store, stores, monkeypatch):
    """A writer may replace the last Zarr shard: rows that were there stay readable."""
    monkeypatch.setattr("vqmill.level.CACHE_BYTES", 1)  # one chunk, so that the file is read again
    codes, expected = vqmill.open_codes(store), stores.codes(stores.two_levels, 21)["top"]
    assert codes["top"][16].tolist() == expected[16].tolist()
    other = stores.codes(stores.two_levels, 8, seed=9)["top"]
    write_whole(store / "top/c/2/0/0", encode_zarr_shard(codes.spec, codes.spec.level("top"), other))
    assert codes["top"][0].tolist() == expected[0].tolist()
    assert codes["top"][18].tolist() == expected[18].tolist()
    assert vqmill.open_codes(store)["top"][18].tolist() == other[2].tolist()


def test_files_are_closed(tmp_path, stores):
    """Many Zarr shards: only the latest stay open, and none when the store is let go."""
    spec = replace(stores.two_levels, rows_per_shard=1)
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, OPEN_SHARDS + 40))
    before = len(os.listdir("/proc/self/fd"))
    codes = vqmill.open_codes(path)
    codes["top"][:]
    assert before + OPEN_SHARDS <= len(os.listdir("/proc/self/fd")) <= before + OPEN_SHARDS + 2
    del codes
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_partly_wanted_chunk_is_decoded_once(many_chunks, monkeypatch):
    codes = vqmill.open_codes(many_chunks)
    source = codes["top"]._source
    read = []
    original = type(source).read_chunk
    monkeypatch.setattr(
        type(source), "read_chunk", lambda self, chunk, out: read.append(chunk) or original(self, chunk, out)
    )
    reader = RowReader(source, lambda values, first: None, "top", cache_bytes=2 * 24)
    out = np.empty((1, 2, 3), np.uint16)
    for row in (0, 1, 2, 3, 0, 1):
        reader.read(np.array([row]), out)
    assert read == [0, 1]
    reader = RowReader(source, lambda values, first: None, "top", cache_bytes=1)
    read.clear()
    for row in (0, 20, 0):
        reader.read(np.array([row]), out)
    assert len(read) == 3


def test_struct_of_the_blosc_header_is_the_documented_one():
    data = blosc.compress(np.zeros(1000, np.uint8), b"lz4", 5)
    assert struct.unpack_from("<III", data, 4)[::2] == (1000, len(data))
