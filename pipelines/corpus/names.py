"""What names say: which files and tar members may hold images, and how a path becomes a key."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from pipelines.corpus.problems import CorpusError

# Formats that are not read (second line) are taken up all the same: such a file is a row with a reason, never passed over in silence.
IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff jp2 j2k jpx j2c jpc avif avifs mpo ppm pgm pbm pnm pfm "  # noqa: SIM905 - not a page of one name a line
    "jxl heic heif psd ico icns tga exr hdr svg dng cr2 nef arw raw dds eps xcf".split()
)
VIDEO_EXTENSIONS = frozenset("mp4 m4v mov mkv webm avi mpg mpeg ts mts m2ts wmv flv ogv 3gp".split())  # noqa: SIM905
PACKED_TAR_EXTENSIONS = frozenset({"tgz", "tbz", "tbz2", "txz", "tzst"})


def extension_of(name: str) -> str:
    """The extension of a file name, lower-cased, without its dot: `a.b.PNG` -> `png`; empty when there is none."""
    return os.path.splitext(name)[1][1:].lower()


def is_gzip_tar(name: str) -> bool:
    """Whether a file is taken for a tar packed with gzip."""
    return name.lower().endswith((".tar.gz", ".tgz"))


def is_tar(name: str, *, gzip_tars: bool) -> bool:
    """Whether a file is taken for a tar that is read.

    Args:
        name: of the file.
        gzip_tars: whether those packed with gzip are.
    """
    return name.lower().endswith(".tar") or (gzip_tars and is_gzip_tar(name))


def passed_over(name: str) -> str:
    """The reason under which a file or tar member that is no image is counted, such as `video: .mp4`."""
    extension = extension_of(name)
    if extension in VIDEO_EXTENSIONS:
        return f"video: .{extension}"  # videos are not read yet
    if extension in PACKED_TAR_EXTENSIONS:
        return f"packed tar: .{extension}"
    if name.lower().endswith(f".tar.{extension}"):
        return f"packed tar: .tar.{extension}"
    return f"not an image: .{extension}" if extension else "not an image: no extension"


def text_of(path: str | bytes) -> str:
    r"""A path as text that UTF-8 can carry; bytes that are not UTF-8 appear as `\xff`.

    A file name is bytes; keys and sources go into tables whose strings are UTF-8.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def keys_of(paths: Sequence[str]) -> list[str]:
    """Paths without their extension; with it where that would not be unique (`a.jpg` beside `a.png`).

    Raises:
        CorpusError: two are the same text.
    """
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(stems)
    whole = set(paths)
    if len(whole) < len(paths):
        raise CorpusError("Two file names differ only in how they spell bytes that are not UTF-8. Rename one of them.")
    return [path if counts[stem] > 1 or stem in whole else stem for path, stem in zip(paths, stems, strict=True)]
