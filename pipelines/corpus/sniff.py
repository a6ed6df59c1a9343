"""Tells the format of a file by its first bytes: to say why it could not be decoded, never to decode it."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Names of formats that are read are Pillow's. `.` stands for any byte.
_SIGNATURES: Mapping[str, re.Pattern[bytes]] = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "WEBP": rb"RIFF....WEBP",
        "GIF": rb"GIF8[79]a",
        "BMP": rb"BM.{4}\0{4}|BM.{12}[\x0c\x28\x40\x6c\x7c]\0\0\0",
        "TIFF": rb"II\x2a\0|MM\0\x2a|II\x2b\0|MM\0\x2b",
        "AVIF": rb".{4}ftyp(.{4}){1,16}?(?<=avi[fs])",  # as the brand or among the compatible ones
        "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
        "PPM": rb"P[1-7Ff][\s#]",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
        "HEIF": rb".{4}ftyp(hei|hev|mif1|msf1)",
        "Photoshop": rb"8BPS",
        "icon": rb"\0\0[\1\2]\0.{2}",
        "OpenEXR": rb"\x76\x2f\x31\x01",
        "Radiance HDR": rb"#\?RADIANCE",
        "DirectDraw surface": rb"DDS ",
        "GIMP": rb"gimp xcf",
        "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
        "SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.{0,500}?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]",
        "Apple icon": rb"icns",
    }.items()
}


def name_of_format(data: bytes) -> str | None:
    r"""The format that the first bytes belong to; None for no image format that we know of.

    >>> name_of_format(b"GIF89a\x01\x00")
    'GIF'
    """
    head = data[:2048]
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(head)), None)
