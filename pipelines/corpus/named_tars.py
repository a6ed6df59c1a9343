"""The tars that a corpus names: by a path or an address, a glob, or braces."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.corpus.braces import expand_braces
from pipelines.corpus.folder import FoundFile
from pipelines.corpus.names import is_gzip_tar, is_tar
from pipelines.corpus.objects import head_objects, list_objects
from pipelines.corpus.problems import CorpusError

FORMS = (
    "a folder of images, tar shards (x/{000..009}.tar, x/*.tar, or a folder of them), the same in a bucket (s3://bucket/x/), "
    "or torchvision:FashionMNIST?root=PATH&split=train"
)


def expand_paths(corpus: str, *, gzip_tars: bool = False) -> list[str]:
    """The absolute paths of the tars that a path, glob or braces name."""
    if Path(corpus).is_file():
        names = [corpus]
    else:
        names = []
        for name in expand_braces(corpus):
            found = sorted(glob.glob(name), key=os.fsencode) if glob.has_magic(name) else [name]
            if not found:
                raise CorpusError(f"{corpus}: nothing matches {name}. A corpus is {FORMS}.")
            names.extend(found)
    missing = [name for name in names if not Path(name).exists()]
    if missing:
        named = (
            f"{len(missing)} of {len(names)} files are missing, such as {missing[0]}"
            if len(names) > 1
            else "no such file or folder"
        )
        raise CorpusError(f"{corpus}: {named}. Correct the path. A corpus is {FORMS}.")
    for name in names:
        if not Path(name).is_file() or not is_tar(name, gzip_tars=gzip_tars):
            what = "a folder" if Path(name).is_dir() else _no_tar(name)
            raise CorpusError(f"{corpus}: {name} is {what}. A corpus is {FORMS}.")
    return [str(Path(name).absolute()) for name in names]


def expand_address(corpus: str, *, gzip_tars: bool = False) -> list[FoundFile]:
    """The objects of a bucket that an address, glob or braces name; their `path` is the whole address.

    Raises:
        CorpusError: one is not there, is no tar, or cannot be had.
    """
    names: list[str] = []
    listed: dict[str, FoundFile] = {}
    for name in expand_braces(corpus):
        found = _matching(name) if glob.has_magic(name) else []
        if glob.has_magic(name) and not found:
            raise CorpusError(f"{corpus}: nothing matches {name}. A corpus is {FORMS}.")
        listed.update({file.path: file for file in found})
        names.extend(file.path for file in found)
        names.extend([] if found else [name])
    others = [name for name in names if not is_tar(name, gzip_tars=gzip_tars)]
    if others:
        raise CorpusError(f"{corpus}: {others[0]} is {_no_tar(others[0])}. A corpus is {FORMS}.")
    asked = [name for name in names if name not in listed]
    heads = dict(zip(asked, head_objects(asked), strict=True))
    missing = [name for name, head in heads.items() if head is None]
    if missing:
        named = f"{len(missing)} of {len(names)} objects are missing, such as {missing[0]}"
        raise CorpusError(f"{corpus}: {named}. Correct the address. A corpus is {FORMS}.")
    listed.update({name: head for name, head in heads.items() if head})
    return [listed[name] for name in names]


def _no_tar(name: str) -> str:
    """What a file is instead, and what to do."""
    if is_gzip_tar(name):
        return "packed with gzip; with --gzip-tars such tars are read, too"
    return "not a .tar (those packed otherwise than with gzip must be unpacked to .tar first)"


def _matching(pattern: str) -> list[FoundFile]:
    """The objects that a glob means: as in a shell, `*` stays inside a part of the path, and leaves out what is hidden."""
    parts = pattern.split("/")
    plain = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:plain])
    found = [file for file in list_objects(root) if _matches(file.path.split("/"), parts[plain:])]
    return [
        FoundFile(f"{root}/{file.path}", file.num_bytes, file.etag)
        for file in sorted(found, key=lambda file: os.fsencode(file.path))
    ]


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(
        fnmatchcase(part, wanted) and (not part.startswith(".") or wanted.startswith("."))
        for part, wanted in zip(path, pattern, strict=True)
    )
