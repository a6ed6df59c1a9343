"""A look at how a file is built before a decoder sees it: Pillow walks headers byte by byte in Python, and files can make it walk for minutes.

What is refused here no encoder writes. Everything else about a header is the decoder's business.
"""

from __future__ import annotations

import re
import struct

from pipelines.corpus.problems import BadImage, Reason

MAX_SEGMENTS = 8192  # of a JPEG before its pixels, each byte of filling counted; 255 hold the largest colour profile
MAX_CHUNKS = 1 << 16  # of a PNG; 8 KB each is usual for pixels
MAX_NUMBERS = 1 << 17  # in all tables of a TIFF, such as the places of its strips
MAX_PLAIN_BYTES = 1 << 18  # of a PPM in plain text
_PPM_HEADER = re.compile(rb"P[1-6f](?:(?:\s|#[^\r\n]*[\r\n])+[0-9.+-]+){2}")
_TEXT_TYPES = frozenset({1, 2, 6, 7})  # bytes, which Pillow takes as they are


def check_header(data: bytes) -> None:
    """Refuses files that would keep a decoder busy with their headers.

    Raises:
        BadImage: decode_error, unsupported_format or truncated.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data)
    elif data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")) and b"\xff\xd9" not in data:
        _refuse("JPEG2000: its end is missing", Reason.TRUNCATED)  # the decoder gives what there is, without a word
    elif re.match(rb"P[1-6f][\s#]", data):
        _check_ppm(data)


def _refuse(what: str, reason: Reason = Reason.DECODE_ERROR) -> None:
    raise BadImage(reason, what)


def _check_jpeg(data: bytes) -> None:
    position = 2
    for _ in range(MAX_SEGMENTS):
        marker = data[position + 1 : position + 2]
        if data[position : position + 1] != b"\xff" or marker in (b"\xda", b"\xd9", b""):
            return
        if marker in (b"\xff", b"\x00"):  # filling
            position += 1
        elif 0xD0 <= marker[0] <= 0xD8 or marker == b"\x01":
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    _refuse(f"JPEG: more than {MAX_SEGMENTS} segments before its pixels")


def _check_png(data: bytes) -> None:
    position = 8
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    _refuse(f"PNG: more than {MAX_CHUNKS} chunks")


def _check_tiff(data: bytes) -> None:
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    place, count, entry = ("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")
    try:
        (position,) = struct.unpack_from(order + place, data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + count, data, position)
        position += struct.calcsize(order + count)
        step = struct.calcsize(order + entry)
        table = data[position : position + min(entries, MAX_NUMBERS) * step]
    except (struct.error, OverflowError):
        return  # the decoder says what is wrong
    numbers = 0
    for _, kind, number, _ in struct.iter_unpack(order + entry, table[: len(table) // step * step]):
        numbers += 1 if kind in _TEXT_TYPES else number
    if numbers > MAX_NUMBERS:
        _refuse(f"TIFF: {numbers} numbers in its tables; at most {MAX_NUMBERS} are read")


def _check_ppm(data: bytes) -> None:
    if not _PPM_HEADER.match(data[:4096]):
        _refuse("PPM with a broken header")
    if data[1:2] in b"123" and len(data) > MAX_PLAIN_BYTES:
        _refuse(f"PPM in plain text, over {MAX_PLAIN_BYTES} bytes", Reason.UNSUPPORTED_FORMAT)
