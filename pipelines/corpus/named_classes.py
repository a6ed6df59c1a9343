"""The names of classes that lie beside tars: `classes.txt` in the folder of the tars, line n for the label n."""

from __future__ import annotations

import os
import re

from pipelines.corpus.objects import get_small, is_address
from pipelines.corpus.problems import CorpusError

CLASSES_FILE = "classes.txt"
MAX_BYTES = 4 << 20  # the 21,841 classes of ImageNet take a tenth of it
MAX_CLASSES = 100_000
JOINERS = re.compile("[\u200c\u200d]")  # parts of words in Persian and Hindi, though they print nothing


def read_class_names(folder: str) -> tuple[str, ...] | None:
    """The names by label, None where there is no such file; an empty line is a class without a name.

    Args:
        folder: of the tars: a path, or the address of a prefix. Servers of `https://` are not asked.

    Raises:
        CorpusError: it cannot be read, is too large, or a line of it is no name.
    """
    where = f"{folder}/{CLASSES_FILE}"
    if folder.lower().startswith(("https:", "http:")):  # they may answer anything to what they do not have
        return None
    data = get_small(folder, CLASSES_FILE, MAX_BYTES) if is_address(folder) else _read(where)
    if data is None:
        return None
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if len(lines) > MAX_CLASSES:
        raise CorpusError(f"{where}: {len(lines):,} lines; at most {MAX_CLASSES:,} classes can have names.")
    return tuple(_name(line, f"{where}, line {number}") for number, line in enumerate(lines, 1))


def _read(path: str) -> bytes | None:
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}). Grant access, or take it away.") from error
    if len(data) > MAX_BYTES:
        raise CorpusError(f"{path}: more than {MAX_BYTES:,} bytes. Take it away, or make it smaller.")
    return data


def _name(line: bytes, place: str) -> str:
    try:
        name = line.decode().removeprefix("\ufeff").strip()  # a mark that some editors begin files with
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place}: not UTF-8 ({error.reason} at byte {error.start} of the line).") from error
    if not JOINERS.sub("", name).isprintable():
        raise CorpusError(f"{place}: {name[:80]!r} has characters that cannot be shown. It holds the name of a class.")
    return name
