"""Files made to waste time or memory: each ends in pixels or in a reason, within 5 seconds and 200 MB."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokenizer
from pipelines.corpus import BadImage, Preprocessing, Reason, decode_image, plan_corpus
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed

MAIN = Path(__file__).with_name("measure_main.py")
ROOT = MAIN.parents[2]


def encode(kind: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(tags: list[tuple[int, int, int, int | bytes]], tail: bytes = b"") -> bytes:
    """A little-endian TIFF of (tag, type, count, value or bytes)."""
    start = 8 + 2 + 12 * len(tags) + 4
    table, values = struct.pack("<H", len(tags)), b""
    for tag, kind, count, value in tags:
        table += struct.pack("<HHLL", tag, kind, count, start + len(values) if isinstance(value, bytes) else value)
        values += value if isinstance(value, bytes) else b""
    return b"II*\0" + struct.pack("<L", 8) + table + bytes(4) + values + tail


def grey(width: int, height: int, compression: int = 1) -> list[tuple[int, int, int, int | bytes]]:
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]


def claims(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header gives another size."""
    place = max(jpeg.find(b"\xff\xc2"), jpeg.find(b"\xff\xc0"))
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


def gif(width: int, height: int, frames: int = 1) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame * frames + b"\x3b"


def rle(width: int, height: int, data: bytes) -> bytes:
    head = struct.pack("<LllHHLLllLL", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<LHHL", 1078 + len(data), 0, 0, 1078) + head + bytes(1024) + data


def hostile_files() -> dict[str, bytes]:
    png, jpeg, progressive = encode("PNG"), encode("JPEG"), encode("JPEG", progressive=True, subsampling=0)
    bomb, text = zlib.compress(bytes(100 << 20), 9), zlib.compress(bytes((1 << 20) - 1), 9)
    scan = progressive[progressive.rfind(b"\xff\xda") : -2]
    places = struct.pack("<L", 8) * 1_000_000
    tile = [(277, 3, 1, 1), (322, 4, 1, 16_000), (323, 4, 1, 16_000), (324, 4, 1, 8), (325, 4, 1, 250_000)]
    strips = [(273, 4, 1_000_000, places), (278, 4, 1, 1), (279, 4, 1_000_000, places)]
    tags = b"MM\0*\0\0\0\x08" + struct.pack(">H", 60_000)
    tags += b"".join(struct.pack(">HHLL", tag, 7, 1 << 20, 720_014) for tag in range(60_000)) + bytes(4 + (1 << 20))
    pieces = (tags[start : start + 65_000] for start in range(0, len(tags), 65_000))
    exif = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces)
    return {
        "iccp.png": png[:33] + chunk(b"iCCP", b"a\0\0" + bomb) + png[33:],
        "ztxt.png": png[:33] + chunk(b"zTXt", b"a\0\0" + bomb) + png[33:],
        "texts.png": png[:33] + chunk(b"zTXt", b"a\0\0" + text) * 300 + png[33:],
        "chunks.png": png[:33] + chunk(b"abCd", b"") * 500_000 + png[33:],
        "surplus.png": png[:33] + chunk(b"IDAT", bomb) + chunk(b"IEND", b""),
        "large.png": encode("PNG", (9900, 9900)),
        "large_alpha.png": encode("PNG", (4800, 4800), "RGBA"),
        "tags.jpg": jpeg[:2] + exif + jpeg[2:],
        "tags.tif": tags,
        "filling.jpg": jpeg[:2] + b"\xff" * 5_000_000 + jpeg[2:],
        "segments.jpg": jpeg[:2] + b"\xff\xfe\0\2" * 1_000_000 + jpeg[2:],
        "scans.jpg": claims(progressive[:-2] + scan * 5000 + b"\xff\xd9", 5000, 5000),
        "claims.jpg": claims(jpeg, 9999, 9999),
        "claims_progressive.jpg": claims(progressive, 9999, 9999),
        "strips.tif": tiff([*grey(8, 1_000_000), *strips]),
        "tile.tif": tiff([*grey(64, 64, 8), *tile], zlib.compress(bytes(256_000_000), 9)),
        "numbers.tif": tiff([*grey(64, 64), (273, 4, 1, 8), (282, 5, 1_000_000, struct.pack("<LL", 7, 3) * 1_000_000)]),
        "canvas.gif": gif(9900, 9900),
        "frames.gif": gif(2000, 2000, 100_000),
        "lines.bmp": rle(9000, 9000, b"\0\0" * 20_000),
        "runs.bmp": rle(2000, 2000, b"\1\1" * 4_000_000),
        "plain.ppm": b"P3 2000 2000 255\n" + b"#\n" * 1_000_000,
        "blank.ppm": b"P6" + b" " * 5_000_000,
        "maximum.ppm": b"P6 2000 2000 100\n" + bytes(12_000_000),
        "large.webp": encode("WEBP", (8000, 8000), lossless=True),
        "size.webp": encode("WEBP").replace(encode("WEBP")[4:8], b"\xff\xff\xff\x7f", 1),
        "large.avif": encode("AVIF", (8000, 8000), speed=10),
        "large.jp2": encode("JPEG2000", (5000, 5000)),
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"\n" * 100_000,
    }  # fmt: skip


def measure(paths: list[Path]) -> Iterator[tuple[str, str, float, float]]:
    command = [sys.executable, "-W", "ignore", str(MAIN), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=True)
    for line in done.stdout.splitlines():
        yield tuple(json.loads(line))


def require_frugal(paths: list[Path]) -> dict[str, str]:
    outcomes = {}
    for name, outcome, seconds, megabytes in measure(paths):
        assert seconds < 5, (name, seconds)
        assert megabytes < 200, (name, megabytes)
        outcomes[name] = outcome
    assert outcomes.keys() == {path.name for path in paths}
    return outcomes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_files_made_to_waste_time_or_memory(tmp_path: Path) -> None:
    for name, data in hostile_files().items():
        (tmp_path / name).write_bytes(data)
    outcomes = require_frugal(sorted(tmp_path.iterdir()))
    decoded = {name for name, outcome in outcomes.items() if outcome not in set(Reason)}
    assert decoded == {"surplus.png", "tags.jpg", "claims.jpg", "frames.gif"}
    assert outcomes["scans.jpg"] == outcomes["segments.jpg"] == outcomes["strips.tif"] == "decode_error"
    assert outcomes["large.png"] == outcomes["tile.tif"] == outcomes["large.webp"] == "too_many_pixels"
    assert outcomes["script.jpg"] == "unsupported_format"


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header of a tar, whatever size it claims."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


def hostile_tars() -> dict[str, bytes]:
    png = encode("PNG")
    good = header("a.png", len(png)) + png + bytes(-len(png) % 512)
    long_name = header("././@LongLink", 1 << 20, b"L") + b"x" * (1 << 20)
    pax = header("p", 1 << 20, b"x") + b"9 a=0123\n" * 116_508 + bytes((1 << 20) - 9 * 116_508)
    sparse = bytearray(header("s.png", 512, b"S"))
    sparse[482] = 1
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148] + b" " * 8 + sparse[156:]))
    return {
        "claims.tar": good + header("b.png", 8 << 30) + png,
        "terabyte.tar": good + header("b.png", 1 << 40),
        "names.tar": good + (long_name + header("b", 0)) * 40 + bytes(1024),
        "pax.tar": good + pax + header("b.png", 0) + bytes(1024),
        "metadata.tar": good + header("././@LongLink", 200 << 20, b"L") + bytes(1024),
        "sparse.tar": good + bytes(sparse) + (bytes(504) + b"\1" + bytes(7)) * 40_000,
        "zeros.tar": good + bytes(40 << 20),
        "members.tar": good + b"".join(header(f"b.{number}", 0) for number in range(20_000)) + bytes(1024),
        "keys.tar": good + b"".join(header(f"{number}.cls", 0) for number in range(20_000)) + bytes(1024),
        "zeros.tar.gz": gzip.compress(good + bytes(120 << 20), 1),
        "claims.tar.gz": gzip.compress(good + header("b.png", 255 << 20) + bytes(120 << 20), 1),
        "skipped.tar.gz": gzip.compress(good + header("b.mp4", 8 << 30) + bytes(120 << 20), 1),
        "members.tar.gz": gzip.compress(good) + gzip.compress(bytes(1 << 20)) * 120,
        "names.tar.gz": gzip.compress(good + (long_name + header("b", 0)) * 100, 1),
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_tars_made_to_waste_time_or_memory(tmp_path: Path) -> None:
    for name, data in hostile_tars().items():
        (tmp_path / name).write_bytes(data)
    outcomes = require_frugal(sorted(tmp_path.iterdir()))
    assert outcomes == {
        "claims.tar": "1 good, 1 truncated",
        "terabyte.tar": "1 good, 1 truncated",
        "names.tar": "1 good",
        "pax.tar": "1 damaged_tar, 1 good",
        "metadata.tar": "1 damaged_tar, 1 good",
        "sparse.tar": "1 good, 1 truncated",
        "zeros.tar": "1 good",
        "members.tar": "1 ambiguous_image, 1 good",
        "keys.tar": "1 good, 20000 missing_image",
        "zeros.tar.gz": "1 good, 1 too_many_bytes",
        "claims.tar.gz": "1 good, 1 too_many_bytes",
        "skipped.tar.gz": "1 good, 1 too_many_bytes",
        "members.tar.gz": "1 good, 1 too_many_bytes",
        "names.tar.gz": "1 good, 1 too_many_bytes",
    }


@pytest.mark.realdata
def test_hostile_tars_are_frugal(real_data: Path) -> None:
    outcomes = require_frugal(sorted((real_data / "hostile" / "tars").iterdir()))
    assert outcomes["empty.tar"] == "no corpus"
    assert outcomes["truncated.tar"] == "8 good, 1 truncated"


@pytest.mark.realdata
def test_hostile_images_are_frugal(real_data: Path) -> None:
    require_frugal(sorted((real_data / "hostile" / "images").iterdir()))


def traps() -> dict[str, bytes]:
    """Broken files whose first `load()` raises, and whose second hands out what the first has left."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = {}
    for kind, broken in (("PNG", b"\xff"), ("JPEG", b"\xff\xc0")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        data = bytearray(file.getvalue())
        middle = len(data) // 2
        data[middle : middle + len(broken)] = broken
        files[f"trap.{kind.lower()}"] = bytes(data)
    return files


def test_what_a_second_load_gives_is_no_row(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    for name, data in traps().items():
        (tmp_path / name).write_bytes(data)
        with Image.open(io.BytesIO(data)) as image:
            with pytest.raises(OSError, match="broken data stream"):
                image.load()
            image.load()  # the trap
            assert np.asarray(image).any()
        for _ in range(2):
            with pytest.raises(BadImage, match="decode_error"):
                decode_image(data, Preprocessing(8))
    (tmp_path / "good.png").write_bytes(encode("PNG"))
    encoder = SpanEncoder(packed(tokenizer.load(tokenizer_folder)), Preprocessing(16), Encoding(), "cpu")
    (shard,) = plan_corpus(str(tmp_path)).shards
    for _ in range(2):
        (span,) = encoder.spans(shard)
        assert span.samples["key"].to_pylist() == ["good"]
        assert span.quarantine["source"].to_pylist() == ["trap.jpeg", "trap.png"]
        assert all(len(codes) == 1 for codes in span.codes.values())


def test_the_memory_allowed_decides() -> None:
    data = encode("PNG", (1000, 1000))
    decode_image(data, Preprocessing(8, max_memory_bytes=8_000_000))
    with pytest.raises(BadImage, match="1000 x 1000 pixels of PNG RGB take 8 MB to decode; at most 7 MB") as raised:
        decode_image(data, Preprocessing(8, max_memory_bytes=7_000_000))
    assert raised.value.reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_cut_anywhere_a_file_gives_pixels_or_a_reason(make_picture, kind: str) -> None:
    data = make_picture(3, 40, 40, kind)
    whole = decode_image(data, Preprocessing(8)).pixels
    for length in range(0, len(data), max(1, len(data) // 150)):
        for _ in range(2):  # asked a second time, a decoder must not hand out what is left of the first
            try:
                pixels = decode_image(data[:length], Preprocessing(8)).pixels
            except BadImage:
                continue
            assert (pixels == whole).all(), (kind, length, len(data))  # what was cut off held no pixels
