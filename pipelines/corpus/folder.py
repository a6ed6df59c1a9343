"""What lies in a folder: which files may be images, which are tars, and what else there is."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.corpus.names import IMAGE_EXTENSIONS, extension_of, is_tar, passed_over, text_of
from pipelines.corpus.problems import CorpusError


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file under the folder, or an object of a bucket.

    Attributes:
        path: relative to the folder, POSIX separators, as the file system gives it.
        num_bytes: its size.
        etag: what an object store calls this state of it; None where it does not say, and for files.
    """

    path: str
    num_bytes: int
    etag: str | None = None


@dataclass
class FolderScan:
    """What a folder holds, each list sorted by relative path as bytes.

    Attributes:
        images: files with an extension of an image format.
        tars: files that end in .tar, and with `gzip_tars` in .tar.gz or .tgz.
        skipped: the others, counted by what they are.
        gzip_tars: whether tars packed with gzip are wanted.
    """

    gzip_tars: bool = False
    images: list[FoundFile] = field(default_factory=list)
    tars: list[FoundFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def take(self, file: FoundFile) -> None:
        """Puts a file where it belongs."""
        if extension_of(file.path) in IMAGE_EXTENSIONS:
            self.images.append(file)
        elif is_tar(file.path, gzip_tars=self.gzip_tars):
            self.tars.append(file)
        else:
            self.skipped[passed_over(file.path)] += 1

    def sort(self) -> FolderScan:
        """Brings the lists into corpus order."""
        for found in (self.images, self.tars):
            found.sort(key=lambda file: os.fsencode(file.path))
        return self


def scan_folder(root: Path, *, gzip_tars: bool = False) -> FolderScan:
    """Lists everything under a folder; hidden files and folders are ignored.

    Links are followed, but never back into a folder that they lie in.

    Raises:
        CorpusError: a folder cannot be listed.
    """
    scan = FolderScan(gzip_tars)
    _scan(str(root), "", (), scan)
    return scan.sort()


def scan_objects(objects: Iterable[FoundFile], *, gzip_tars: bool = False) -> FolderScan:
    """Sorts out what was listed of a bucket, as `scan_folder` does: what is hidden, and the marks of empty folders, are ignored."""
    scan = FolderScan(gzip_tars)
    for found in objects:
        if not found.path.endswith("/") and not any(part.startswith(".") for part in found.path.split("/")):
            scan.take(found)
    return scan.sort()


def _scan(root: str, below: str, parents: tuple[tuple[int, int], ...], scan: FolderScan) -> None:
    folder = os.path.join(root, below)
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in parents:
            scan.skipped["link: back into its own folder"] += 1
            return
        with os.scandir(folder) as listing:
            entries = [entry for entry in listing if not entry.name.startswith(".")]
        for entry in entries:
            _take(root, f"{below}/{entry.name}" if below else entry.name, (*parents, here), scan)
    except OSError as error:
        raise CorpusError(
            f"{text_of(folder)}: this folder of the corpus cannot be read ({error.strerror}). Grant access, or move it away."
        ) from error


def _take(root: str, path: str, parents: tuple[tuple[int, int], ...], scan: FolderScan) -> None:
    try:
        status = os.stat(os.path.join(root, path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        scan.skipped["link: to nothing"] += 1
        return
    if stat.S_ISDIR(status.st_mode):
        _scan(root, path, parents, scan)
    elif not stat.S_ISREG(status.st_mode):
        scan.skipped["not a file: pipe, socket or device"] += 1
    else:
        scan.take(FoundFile(path, status.st_size))
