"""Compiled reading: bit for bit what Python reads, whatever the chunk; on damage it stops where Python says what is wrong."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
from numcodecs import Blosc, Zstd

import vqmill
from vqmill import CodesError, native
from vqmill.chunks import ChunkLayout, decode_chunk
from vqmill.reader import RowReader

SHUFFLES = {"bit": Blosc.BITSHUFFLE, "byte": Blosc.SHUFFLE, "none": Blosc.NOSHUFFLE}
DTYPES = ("u1", "u2", "u4", "i8")


@pytest.fixture(scope="module")
def read_chunks():
    try:
        return native.load()
    except native.UnavailableError as error:
        pytest.skip(str(error))


def values_of(dtype, count, below=200):
    """Small values with repetitions, so that some streams are compressed and others kept as they are."""
    values = np.random.default_rng(count).integers(0, below, count).astype(dtype)
    values[: count // 3] = 1
    return values


def with_crc(data):
    return bytes(data) + google_crc32c.value(bytes(data)).to_bytes(4, "little")


class Chunks:
    """Encoded chunks in a file, and both ways to read them."""

    def __init__(self, path, read_chunks, dtype, count, compressor="blosc"):
        self.layout = ChunkLayout((count,), np.dtype(dtype), 1, compressor)
        self._path, self._read_chunks = path, read_chunks

    def compiled(self, chunks, below=0):
        """How many were right, and what was read."""
        self._path.write_bytes(b"".join(chunks))
        sizes = np.array([len(chunk) for chunk in chunks])
        with self._path.open("rb") as file:
            table = np.stack([np.full(len(chunks), file.fileno()), np.cumsum(sizes) - sizes, sizes], axis=1)
            out = np.empty((len(chunks), self.layout.raw_bytes), np.uint8)
            itemsize = self.layout.dtype.itemsize
            scratch = native.Scratch.of(max(self.layout.max_chunk_bytes, sizes.max()), self.layout.raw_bytes, itemsize)
            done = self._read_chunks(
                table.astype(np.int64), out, itemsize, self.layout.compressor == "blosc", below, *scratch
            )
        return done, out.view(self.layout.dtype)

    def python(self, chunk):
        """The values, or None when the chunk is refused."""
        out = np.empty(self.layout.chunk_shape, self.layout.dtype)
        try:
            decode_chunk(np.frombuffer(chunk, np.uint8), self.layout, out)
        except CodesError:
            return None
        return out


@pytest.mark.parametrize("cname", ["zstd", "lz4", "lz4hc", "zlib", "blosclz"])
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [7, 64, 200, 4096, 65_536, 70_016])
def test_every_kind_of_blosc(tmp_path, read_chunks, cname, shuffle, dtype, count):
    """Of one block and of several, with a shorter one at the end, of whole words and not; noise is kept as it is."""
    chunks = Chunks(tmp_path / "chunks", read_chunks, dtype, count)
    for blocksize in (0, 4096, 24_576):
        codec = Blosc(cname, clevel=3, shuffle=SHUFFLES[shuffle], blocksize=blocksize)
        values = [
            values_of(dtype, count),
            np.zeros(count, dtype),
            values_of(dtype, count, 2 ** (8 if dtype == "u1" else 16)),
        ]
        done, found = chunks.compiled([with_crc(codec.encode(each)) for each in values])
        assert done == 3
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zstd(tmp_path, read_chunks, dtype):
    values = [values_of(dtype, 3000), values_of(dtype, 3000, 100)]
    chunks = Chunks(tmp_path / "chunks", read_chunks, dtype, 3000, "zstd")
    done, found = chunks.compiled([with_crc(Zstd(3).encode(each)) for each in values])
    assert done == 2
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_held_against_the_bound(tmp_path, read_chunks, dtype):
    chunks = Chunks(tmp_path / "chunks", read_chunks, dtype, 4096)
    values = [values_of(dtype, 4096, 100) for _ in range(3)]
    values[1][4095] = 100
    encoded = [with_crc(Blosc("zstd", 3, Blosc.BITSHUFFLE).encode(each)) for each in values]
    assert [chunks.compiled(encoded, below)[0] for below in (0, 101, 100)] == [3, 3, 1]


@pytest.mark.parametrize("compressor", ["zstd", "lz4", "plain zstd"])
def test_damage_stops_both(tmp_path, read_chunks, compressor):
    """Each byte of a header, and many behind, changed under a right checksum: what one refuses the other does, and what is read is equal."""
    plain = compressor == "plain zstd"
    codec = Zstd(3) if plain else Blosc(compressor, 3, Blosc.BITSHUFFLE, blocksize=4096)
    chunks = Chunks(tmp_path / "chunks", read_chunks, "u2", 6144, "zstd" if plain else "blosc")
    data = bytes(codec.encode(values_of("u2", 6144)))
    generator = np.random.default_rng(0)
    places = [*range(48), *generator.integers(48, len(data), 150)]
    refused = 0
    for place in places:
        for change in (1, 0x80, int(generator.integers(1, 256))):
            broken = bytearray(data)
            broken[place] ^= change
            chunk = with_crc(broken)
            expected, (done, found) = chunks.python(chunk), chunks.compiled([chunk])
            assert not (done and expected is None), (place, change)
            if done:
                np.testing.assert_array_equal(found[0], expected)
            refused += not done
    assert refused > 48


@pytest.mark.parametrize("cut", [0, 3, 4, 12, 20, 40, 200])
def test_short_chunks_stop_both(tmp_path, read_chunks, cut):
    chunks = Chunks(tmp_path / "chunks", read_chunks, "u2", 6144)
    data = bytes(Blosc("zstd", 3, Blosc.BITSHUFFLE).encode(values_of("u2", 6144)))
    short = with_crc(data[: cut - 4]) if cut >= 4 else b"\0" * cut
    honest = bytearray(data[: max(cut - 4, 0)])  # says its own length
    if len(honest) >= 16:
        honest[12:16] = struct.pack("<I", len(honest))
    for chunk in (short, with_crc(honest)):
        assert chunks.python(chunk) is None
        assert chunks.compiled([chunk])[0] == 0


def test_a_wrong_checksum_a_short_file_and_a_bad_descriptor_stop_it(tmp_path, read_chunks):
    chunks = Chunks(tmp_path / "chunks", read_chunks, "u2", 6144)
    good = with_crc(Blosc("zstd", 3, Blosc.BITSHUFFLE).encode(values_of("u2", 6144)))
    assert chunks.compiled([good, good[:-1] + bytes([good[-1] ^ 1]), good])[0] == 1
    out, scratch = np.empty((1, 12_288), np.uint8), native.Scratch.of(len(good), 12_288, 2)
    with (tmp_path / "chunks").open("rb") as file:
        for descriptor, start, size in (
            (file.fileno(), 2 * len(good) + 1, len(good)),
            (file.fileno(), 0, len(good) + 1),
            (file.fileno(), -1, len(good)),
            (file.fileno(), 0, -1),
            (2**30, 0, len(good)),
        ):
            table = np.array([[descriptor, start, size]])
            assert read_chunks(table, out, 2, True, 0, *scratch) == 0
        assert read_chunks(np.array([[file.fileno(), 0, len(good)]]), out, 2, True, 0, *scratch) == 1


def test_it_is_loaded_when_it_is_worth_it(monkeypatch):
    loaded = []
    monkeypatch.setattr(native, "load", lambda: loaded.append(1) or len)
    chosen = native.Native(worth_bytes=100)
    assert chosen.read_chunks(99) is None
    assert not loaded
    assert chosen.read_chunks(1) is len
    assert chosen.read_chunks(1) is len
    assert loaded == [1]


@pytest.mark.parametrize("module", ["numcodecs.blosc", "google_crc32c._crc32c", ""])
def test_without_the_functions_python_reads(store, stores, monkeypatch, caplog, module):
    pytest.importorskip("numba")
    monkeypatch.setitem(native.FUNCTIONS, module, ("no_such_function",))
    monkeypatch.setattr(native, "PROCESS", native.Native(worth_bytes=0))
    with caplog.at_level(logging.WARNING):
        assert vqmill.open_codes(store)["top"][:].tolist() == stores.codes(stores.two_levels, 21)["top"].tolist()
    assert caplog.text.count("no_such_function") == 1
    assert (module or "the C library") in caplog.text


def test_without_numba_python_reads_and_says_nothing(store, stores, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "vqmill.kernels", raising=False)
    monkeypatch.delattr("vqmill.kernels", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(native, "PROCESS", native.Native(worth_bytes=0))
    assert vqmill.open_codes(store)["top"][:].tolist() == stores.codes(stores.two_levels, 21)["top"].tolist()
    assert not caplog.text
    with pytest.raises(native.UnavailableError, match=r"pip install 'vqmill\[fast\]'"):
        native.load()


def test_a_machine_of_another_kind_is_told(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(native.UnavailableError, match="little-endian"):
        native.load()


def test_whole_chunks_are_read_together(tmp_path, stores, monkeypatch, both_ways):
    """The compiled way is taken by an epoch: no chunk of codes is decoded by Python."""
    monkeypatch.setattr("vqmill.spec.CHUNK_BYTES", 30)
    path = stores.write(tmp_path / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 24))
    decoded = []
    monkeypatch.setattr("vqmill.reader.decode_chunk", lambda *arguments: decoded.append(1) or decode_chunk(*arguments))
    codes = vqmill.open_codes(path)
    assert len(codes["top"][:]) == 24
    assert bool(decoded) == (both_ways == "python")


@pytest.mark.parametrize("cache", ["kept", "nowhere"])
def test_the_compiled_code_is_kept_where_that_can_be(tmp_path, read_chunks, store, cache):
    """What was kept is right in another process, whose functions lie elsewhere; without a folder to write into, each compiles."""
    script = (
        "import sys, vqmill; from vqmill import native; native.PROCESS = native.Native(0); "
        "codes = vqmill.open_codes(sys.argv[1]); print(codes['top'][:].sum(), native.PROCESS.read_chunks(0) is not None)"
    )
    total = int(vqmill.open_codes(store)["top"][:].sum())
    (tmp_path / "file").touch()
    folder = tmp_path / "cache" if cache == "kept" else tmp_path / "file" / "below"
    environment = {"NUMBA_CACHE_DIR": str(folder), "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    for _ in range(2 if cache == "kept" else 1):
        found = subprocess.run(
            [sys.executable, "-c", script, str(store)], env=os.environ | environment, capture_output=True, text=True, check=True
        )  # fmt: skip
        assert found.stdout.split() == [str(total), "True"], found.stderr
    assert bool(list(tmp_path.rglob("*.nbi"))) == (cache == "kept")


def test_other_types_are_refused_not_compiled(read_chunks):
    with pytest.raises(TypeError):
        read_chunks(np.empty((0, 3), np.int32), np.empty((0, 0), np.uint8), 1, True, 0, *native.Scratch.of(0, 0, 1))


class Refusing:
    """Chunks that cannot be read at once."""

    chunk_shape, dtype = (4, 2, 2), np.dtype(np.uint16)

    def __init__(self) -> None:
        self.offered = 0

    def read_chunk(self, chunk: int, out: np.ndarray) -> None:
        out[:] = chunk

    def read_chunks(self, chunks: list[int], out: np.ndarray, below: int) -> int:
        self.offered += len(chunks)
        return 0


def test_what_cannot_be_read_at_once_is_offered_once():
    source, out = Refusing(), np.empty((400, 2, 2), np.uint16)
    RowReader(source, lambda values, first: None, "codes", 1 << 20, below=500).read(np.arange(400), out)
    assert source.offered == 100
    assert out[:, 0, 0].tolist() == (np.arange(400) // 4).tolist()


def test_only_what_python_decodes_is_counted(store, monkeypatch):
    counted = []
    monkeypatch.setattr(native.PROCESS, "read_chunks", lambda number: counted.append(number))
    codes = vqmill.open_codes(store)["top"]
    rows = codes[:]
    chunks = -(-len(codes) // codes.chunk_rows)
    assert sum(counted) == chunks * codes.chunk_rows * rows[0].nbytes
