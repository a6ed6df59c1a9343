"""Reads an input shard: one row for every sample it was planned with, good or bad."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.grouping import MAX_SAMPLE_BYTES, Part, Tally, TarSample, walk_samples
from pipelines.corpus.idx import read_idx
from pipelines.corpus.names import is_gzip_tar, text_of
from pipelines.corpus.objects import RemoteObject, changed, get_object, is_address, open_object, open_tar
from pipelines.corpus.plan import FileBundle, IdxRange, ImageFile, InputShard, Retried, TarFile
from pipelines.corpus.problems import CorpusError, Problem, Reason

OPEN_TARS = 32  # kept open between samples
REQUESTS = 8  # for loose objects of a bucket, on their way at once
NEAR_BYTES = 1 << 16  # between the members of a sample that are fetched in one request
MAX_LABEL = 2**63 - 1  # labels are stored as int64, and -1 means none
Row = TypeVar("Row")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in the corpus, not decoded.

    Attributes:
        key: unique in a folder or an idx corpus; in tars as it is there.
        source: the file it came from, relative to the corpus.
        index: its place in its input shard; bad ones are counted.
        image: the bytes of an image file, or uint8 [H, W]; None when there is a problem.
        label: of its class, from 0; None when there is none.
        caption: the text that belongs to it.
        json: JSON as written.
        problem: why it cannot be used, else None. (Whether the image decodes is not known yet.)
    """

    key: str
    source: str
    index: int
    image: bytes | NDArray[np.uint8] | None = None
    label: int | None = None
    caption: str | None = None
    json: str | None = None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample lies: what `list_samples` gives and `load_sample` takes.

    Attributes:
        key, source, index, problem: as in `RawSample`.
        place: what it takes to read it; of a tar that is packed with gzip, its data.
    """

    key: str
    source: str
    index: int
    problem: Problem | None
    place: ImageFile | TarSample | None

    @property
    def held_bytes(self) -> int:
        """How much data this holds, beside short texts."""
        if not isinstance(self.place, TarSample) or self.place.image is None or self.place.image.data is None:
            return 0
        return sum(part.size for part in self.place.parts)

    def without_data(self) -> SampleRef:
        """One that holds none; should it hold some now, loading the sample will unpack its tar from the start."""
        return replace(self, place=None) if self.held_bytes else self


def read_samples(shard: InputShard, start: int = 0) -> Iterator[RawSample]:
    """Reads the samples of an input shard in order, `shard.num_samples - start` of them whatever has become of its files.

    Args:
        shard: from a plan.
        start: the first index wanted; what lies before it is passed over cheaply.
    """
    if isinstance(shard.content, TarFile) and not shard.known:
        yield from _walk_tar(shard, start, load=True, convert=_from_tar)
    elif shard.remote:
        yield from _read_ahead(shard, list_samples(shard, start))
    else:
        for ref in list_samples(shard, start):
            yield load_sample(shard, ref)


def _read_ahead(shard: InputShard, refs: Iterator[SampleRef]) -> Iterator[RawSample]:
    """Several requests on their way; samples in order."""
    waiting: deque[Future[RawSample]] = deque()
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="requests") as threads:
        try:
            while True:
                for ref in islice(refs, REQUESTS - len(waiting)):
                    waiting.append(threads.submit(load_sample, shard, ref))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


def list_samples(shard: InputShard, start: int = 0) -> Iterator[SampleRef]:
    """The same samples in the same order as `read_samples` gives, without their data, but for tars that are packed with gzip."""
    known = dict(shard.known)
    for ref in _listed(shard, start):
        yield replace(ref, problem=known[ref.index]) if ref.index in known else ref


def _listed(shard: InputShard, start: int) -> Iterator[SampleRef]:
    match shard.content:
        case TarFile(path=path):
            yield from _walk_tar(shard, start, load=is_gzip_tar(path), convert=_tar_ref)
        case FileBundle(files=files):
            for index, file in enumerate(files[start:], start):
                yield SampleRef(file.key, text_of(file.path), index, None, file)
        case IdxRange(files=files, start=first):
            source = os.path.basename(files.images)
            for index in range(start, shard.num_samples):
                yield SampleRef(f"{files.split}-{first + index:08d}", source, index, None, None)
        case Retried(base=base, indices=indices):
            if start < len(indices):
                first, last, wanted = indices[start], indices[-1], frozenset(indices)
                refs = islice(list_samples(base, first), last - first + 1)
                yield from (ref for ref in refs if ref.index in wanted)


def load_sample(shard: InputShard, ref: SampleRef) -> RawSample:
    """Reads one sample; safe to call from several threads."""
    if ref.problem is not None:
        return RawSample(ref.key, ref.source, ref.index, problem=ref.problem)
    match shard.content:
        case Retried(base=base):
            return load_sample(base, ref)
        case TarFile(path=path, whole=whole):
            if ref.place is None:
                return next(_walk_tar(shard, ref.index, load=True, convert=_from_tar))
            assert isinstance(ref.place, TarSample)
            return _load_from_tar(whole or shard, path, ref.place)
        case FileBundle(root=root):
            assert isinstance(ref.place, ImageFile)
            return _load_file(root, ref.place, ref)
        case IdxRange(files=files, start=first):
            try:
                image = read_idx(files.images, 3)[first + ref.index]
                label = int(read_idx(files.labels, 1)[first + ref.index])
            except (OSError, CorpusError, IndexError) as error:
                return RawSample(ref.key, ref.source, ref.index, problem=Problem(Reason.UNREADABLE, str(error)))
            return RawSample(ref.key, ref.source, ref.index, image=image, label=label)


def _load_file(root: str, file: ImageFile, ref: SampleRef) -> RawSample:
    if file.num_bytes > MAX_SAMPLE_BYTES:
        what = f"{file.num_bytes} bytes; at most {MAX_SAMPLE_BYTES} are read"
        return RawSample(ref.key, ref.source, ref.index, problem=Problem(Reason.TOO_MANY_BYTES, what))
    try:
        if is_address(root):
            data = get_object(root, file.path, file.num_bytes, file.etag)
            return RawSample(ref.key, ref.source, ref.index, image=data, label=file.label)
        # O_NONBLOCK: should the file have become a pipe, opening it must not hang.
        descriptor = os.open(os.path.join(root, file.path), os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != file.num_bytes:
                problem = Problem(Reason.UNREADABLE, changed(status.st_size, file.num_bytes))
            else:
                return RawSample(ref.key, ref.source, ref.index, image=opened.read(), label=file.label)
    except OSError as error:
        problem = Problem(Reason.UNREADABLE, error.strerror or str(error))
    return RawSample(ref.key, ref.source, ref.index, problem=problem)


def _walk_tar(
    shard: InputShard, start: int, load: bool, convert: Callable[[InputShard, TarSample], Row]
) -> Iterator[Row]:
    """Walks a tar and fills up with `unreadable` rows what it was planned with and no longer holds."""
    whole, first = shard.of_tar.whole or shard, shard.of_tar.start
    index = start
    detail = "the tar has changed since the corpus was planned"
    try:
        with open_tar(shard.of_tar.path, whole.num_bytes, whole.of_tar.etag) as file:
            for sample in walk_samples(file, Tally(), first + start, load):
                if index == shard.num_samples:
                    break
                yield convert(whole, replace(sample, index=index) if first else sample)
                index += 1
    except OSError as error:
        detail = error.strerror or str(error)
    for missing in range(index, shard.num_samples):
        yield convert(whole, TarSample(f"#{first + missing}", missing, problem=Problem(Reason.UNREADABLE, detail)))


def _tar_ref(shard: InputShard, sample: TarSample) -> SampleRef:
    return SampleRef(sample.key, shard.name, sample.index, sample.problem, sample)


def _load_from_tar(shard: InputShard, path: str, sample: TarSample) -> RawSample:
    assert sample.image is not None
    if sample.image.data is not None:
        return _from_tar(shard, sample)
    try:
        if is_address(path):
            remote = open_object(path, shard.num_bytes, shard.of_tar.etag)
            image, label, caption, text = _fetched(remote, sample)
        else:
            there = os.stat(path)
            if there.st_size != shard.num_bytes:
                raise OSError(changed(there.st_size, shard.num_bytes))
            opened = _opened(path, there.st_dev, there.st_ino)  # held while it is read, so that it stays open
            file = opened.descriptor
            image, label = _pread(file, sample.image), _pread(file, sample.label)
            caption, text = _pread(file, sample.caption), _pread(file, sample.json)
    except OSError as error:
        return RawSample(
            sample.key, shard.name, sample.index, problem=Problem(Reason.UNREADABLE, error.strerror or str(error))
        )
    return _from_tar(shard, TarSample(sample.key, sample.index, image, label, caption, text))


class _OpenFile:
    """A file open for reading at any place, by any thread; closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=OPEN_TARS)  # a sample of small images is read faster than its tar is opened
def _opened(path: str, device: int, inode: int) -> _OpenFile:
    """The file that is there now; another one in its place is opened anew."""
    file = _OpenFile(path)
    status = os.fstat(file.descriptor)
    if (status.st_dev, status.st_ino) != (device, inode):
        raise OSError("the tar has changed since the corpus was planned")
    return file


def _pread(descriptor: int, part: Part | None) -> Part | None:
    if part is None or part.data is not None:
        return part
    data = os.pread(descriptor, part.size, part.offset)
    if len(data) < part.size:
        raise OSError("the tar ends too early")
    return Part(part.offset, part.size, data)


def _fetched(remote: RemoteObject, sample: TarSample) -> list[Part | None]:
    """The four members of a sample, in one request where they lie side by side."""
    first = min(part.offset for part in sample.parts)
    length = max(part.offset + part.size for part in sample.parts) - first
    near = length <= sum(part.size for part in sample.parts) + NEAR_BYTES
    data = remote.pread(first, length) if near else b""
    members = (sample.image, sample.label, sample.caption, sample.json)
    return [
        part
        and replace(
            part, data=data[part.offset - first :][: part.size] if near else remote.pread(part.offset, part.size)
        )
        for part in members
    ]


def _from_tar(shard: InputShard, sample: TarSample) -> RawSample:
    """Reads the meaning of a sample's members."""
    problem = sample.problem
    if problem is None:
        assert sample.image is not None
        try:
            label = _label(sample.label)
            caption = _text(sample.caption, "the caption")
            text, json_label = _json(sample.json)
        except _BadMember as bad:
            problem = bad.problem
        else:
            label = json_label if sample.label is None else label
            return RawSample(sample.key, shard.name, sample.index, sample.image.data, label, caption, text)
    return RawSample(sample.key, shard.name, sample.index, problem=problem)


class _BadMember(Exception):  # noqa: N818 - a fact about the data, which becomes a row
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(reason, detail)


def _text(part: Part | None, what: str) -> str | None:
    if part is None:
        return None
    assert part.data is not None
    try:
        return part.data.decode()
    except UnicodeDecodeError as error:
        raise _BadMember(Reason.BAD_TEXT, f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _label(part: Part | None) -> int | None:
    if part is None:
        return None
    assert part.data is not None
    text = part.data[:64].decode("utf-8", "backslashreplace").strip()
    if part.size > 64 or not _INTEGER.fullmatch(text):
        raise _BadMember(Reason.BAD_LABEL, f"expected an integer in .cls, found {text[:40]!r}")
    return _checked_label(int(text))


def _checked_label(label: int) -> int | None:
    if not -1 <= label <= MAX_LABEL:
        raise _BadMember(Reason.BAD_LABEL, f"the label {label} is not between -1 (none) and 2^63 - 1")
    return None if label == -1 else label


def _json(part: Part | None) -> tuple[str | None, int | None]:
    """JSON as written, and its integer `label` if it has one."""
    text = _text(part, "the JSON")
    if text is None:
        return None, None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadMember(Reason.BAD_TEXT, f"the JSON cannot be parsed ({error})") from error
    label = value.get("label") if isinstance(value, dict) else None
    return text, _checked_label(label) if type(label) is int else None
