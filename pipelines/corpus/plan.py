"""Turns what a user calls a corpus into a fixed list of input shards, before any work is done on it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from pipelines.corpus.folder import FolderScan, FoundFile, scan_folder, scan_objects
from pipelines.corpus.grouping import Tally, walk_samples
from pipelines.corpus.named_classes import CLASSES_FILE, read_class_names
from pipelines.corpus.named_tars import FORMS, expand_address, expand_paths
from pipelines.corpus.names import is_gzip_tar, is_tar, keys_of, passed_over, text_of
from pipelines.corpus.objects import check_address, is_address, list_objects, open_tar
from pipelines.corpus.problems import CorpusError, Problem
from pipelines.corpus.published import PREFIX, IdxFiles, find_published
from vqmill.kinds import held_by, kind_of

FILES_PER_SHARD = 256
ROWS_PER_SHARD = 1024
WALKERS = 4  # tars of a bucket that are walked through at once


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of a folder, or object of a bucket.

    Attributes:
        path: relative to the folder, as the file system gives it.
        key: unique in the corpus.
        label: the number of its class folder, None when the folder has no classes.
        num_bytes: its size when the corpus was planned.
        etag: of an object, as `FoundFile` has it.
    """

    path: str
    key: str
    label: int | None
    num_bytes: int
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class FileBundle:
    """Loose files, read one at a time. `root` is the folder, absolute, or the address of a prefix."""

    root: str
    files: tuple[ImageFile, ...]


@dataclass(frozen=True, slots=True)
class TarFile:
    """A tar, or a part of it.

    Attributes:
        path: absolute, or the address of an object.
        start: the first of its samples.
        whole: the input shard of the whole tar, for a part.
        etag: of an object, as `FoundFile` has it.
    """

    path: str
    start: int = 0
    whole: InputShard | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class IdxRange:
    """Rows of a pair of idx files, from `start`."""

    files: IdxFiles
    start: int


@dataclass(frozen=True, slots=True)
class Retried:
    """Some samples of an input shard, by their index in it, ascending."""

    base: InputShard
    indices: tuple[int, ...]


@dataclass(frozen=True)
class InputShard:
    """A piece of a corpus that is read from its beginning to its end.

    Attributes:
        index: its place in the corpus; of samples that are tried again, that of the input shard they are in.
        name: unique in the plan and the same wherever the corpus lies.
        num_samples: rows that reading it gives, the bad ones among them.
        num_bytes: what is read of it.
        content: where its samples are.
        known: problems of samples by index, that are told again and not looked for: these samples are tried again elsewhere in the plan.
    """

    index: int
    name: str
    num_samples: int
    num_bytes: int
    content: FileBundle | TarFile | IdxRange | Retried
    known: tuple[tuple[int, Problem], ...] = ()

    @property
    def kind(self) -> Literal["files", "tar", "idx", "retry"]:
        """What it is made of."""
        match self.content:
            case FileBundle():
                return "files"
            case TarFile():
                return "tar"
            case IdxRange():
                return "idx"
            case Retried():
                return "retry"

    @property
    def of_tar(self) -> TarFile:
        """The tar that it is, or a part of."""
        assert isinstance(self.content, TarFile)
        return self.content

    @property
    def remote(self) -> bool:
        """Whether it lies in a bucket."""
        match self.content:
            case FileBundle(root=place) | TarFile(path=place):
                return is_address(place)
            case IdxRange():
                return False
            case Retried(base=base):
                return base.remote

    @property
    def first_file(self) -> Path | None:
        """The file that reading it begins with; None when it lies in a bucket."""
        match self.content:
            case _ if self.remote:
                return None
            case FileBundle(root=root, files=files):
                return Path(root, files[0].path)
            case TarFile(path=path):
                return Path(path)
            case IdxRange(files=pair):
                return Path(pair.images)
            case Retried(base=base):
                return base.first_file

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of its names, sizes and labels, and of what a server calls its state; paths outside the corpus and times have no part in it."""
        facts: list[object] = [self.kind, self.name, self.num_samples, self.num_bytes]
        if isinstance(self.content, FileBundle):
            facts.append([_facts(file) for file in self.content.files])
        elif isinstance(self.content, TarFile) and self.content.whole:
            facts.append(self.content.whole.digest)  # of a tar that has changed, no part is as it was
        elif isinstance(self.content, TarFile) and self.content.etag:
            facts.append(self.content.etag)
        elif isinstance(self.content, Retried):
            facts += [self.content.base.digest, self.content.indices]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A corpus as a list of input shards in corpus order.

    Attributes:
        corpus: as the user wrote it.
        shards: never empty, and they hold at least one sample.
        class_names: names by label; empty when the corpus names no classes.
        skipped: what might have been samples and was passed over, counted by reason, such as `video: .mp4` or `not an image: .txt`.
        unused: what lies in tars beside the samples: directories, members that nothing reads.
    """

    corpus: str
    shards: tuple[InputShard, ...]
    class_names: tuple[str, ...]
    skipped: Mapping[str, int]
    unused: Mapping[str, int]

    @cached_property
    def num_samples(self) -> int:
        """Rows that reading the whole corpus gives, the bad ones among them."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_retried(self) -> int:
        """How many of them are samples that are tried again."""
        return sum(shard.num_samples for shard in self.shards if shard.kind == "retry")

    @property
    def num_bytes(self) -> int:
        """What is read in one pass over the corpus."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all names, sizes and counts: the same wherever the corpus lies."""
        return self.digest_of_first(len(self.shards))

    def digest_of_first(self, input_shards: int) -> str:
        """The digest of the plan that has only the first so many input shards of this one."""
        return hashlib.sha256("\n".join(shard.digest for shard in self.shards[:input_shards]).encode()).hexdigest()

    def first(self, input_shards: int) -> Plan:
        """The plan of the first so many input shards."""
        return replace(self, shards=self.shards[:input_shards])

    def cut_at(self, totals: Sequence[int]) -> Plan:
        """The same samples in the same order, with an input shard ending wherever so many samples are behind.

        So a corpus that has grown is cut like the corpus of before, whose last bundle was not full.
        """
        shards: list[InputShard] = []
        behind = 0
        for shard in self.shards:
            cuts = sorted({total - behind for total in totals if 0 < total - behind < shard.num_samples})
            if not cuts and shard.index == len(shards):
                shards.append(shard)
            else:
                for start, stop in pairwise([0, *cuts, shard.num_samples]):
                    shards.append(_part(shard, len(shards), start, stop))
            behind += shard.num_samples
        return replace(self, shards=tuple(shards))

    def first_samples(self, number: int) -> Plan:
        """The plan of the first so many samples; the same one when it has no more."""
        if number >= self.num_samples:
            return self
        cut = self.cut_at([number])
        ends = list(accumulate(shard.num_samples for shard in cut.shards))
        corpus = f"{self.corpus} (its first {number:,} samples)"
        return replace(cut.first(ends.index(number) + 1), corpus=corpus)


def plan_corpus(corpus: str, progress: Callable[[int, int], None] | None = None, *, gzip_tars: bool = False) -> Plan:
    """Lists the input shards of a corpus. Headers of tars are walked through; no image is read.

    Args:
        corpus: a folder of images (searched deeply; when every image lies in a subfolder, the first level names the classes),
            tar shards (a path, a glob, braces, or a folder that holds tars and no images), either of them in a bucket
            (`s3://bucket/prefix/`, `gs://`, `az://`; tars also by `https://`), or `torchvision:NAME?root=PATH&split=train|test|all`.
        progress: called with (tars walked, of how many).
        gzip_tars: whether tars that end in .tar.gz or .tgz are read, too; they are unpacked whole.

    Raises:
        CorpusError: there is nothing there, or nothing that is read; the message says what to do.
    """
    if corpus.startswith(PREFIX):
        plan = _plan_published(corpus)
    elif is_address(corpus):
        check_address(corpus)
        plan = _plan_address(corpus, progress, gzip_tars)
    elif Path(corpus).is_dir():
        plan = _plan_folder(corpus, progress, gzip_tars)
    else:
        tars = [FoundFile(path, os.path.getsize(path)) for path in expand_paths(corpus, gzip_tars=gzip_tars)]
        plan = _plan_tars(corpus, tars, Counter(), progress)
    if plan.num_samples == 0:
        passed = ", ".join(f"{count} x {what}" for what, count in sorted(plan.skipped.items()))
        packed = {"packed tar: .tar.gz", "packed tar: .tgz"} & plan.skipped.keys()
        advice = " With --gzip-tars tars packed with gzip are read, too." if packed else ""
        raise CorpusError(
            f"{corpus}: no sample in it{f' (passed over: {passed})' if passed else ''}.{advice} A corpus is {FORMS}."
        )
    return plan


def _plan_folder(corpus: str, progress: Callable[[int, int], None] | None, gzip_tars: bool) -> Plan:
    root = Path(corpus).absolute()
    if kind_of(root):  # the pictures in it are no corpus
        raise CorpusError(f"{corpus}: not a corpus: {held_by(Path(corpus))}. A corpus is {FORMS}.")
    return _plan_scan(corpus, str(root), scan_folder(root, gzip_tars=gzip_tars), progress)


def _plan_address(corpus: str, progress: Callable[[int, int], None] | None, gzip_tars: bool) -> Plan:
    if glob.has_magic(corpus) or "{" in corpus or is_tar(corpus, gzip_tars=True):
        return _plan_tars(corpus, expand_address(corpus, gzip_tars=gzip_tars), Counter(), progress)
    scan = scan_objects(list_objects(corpus), gzip_tars=gzip_tars)
    return _plan_scan(corpus, corpus.rstrip("/"), scan, progress)


def _plan_scan(corpus: str, root: str, scan: FolderScan, progress: Callable[[int, int], None] | None) -> Plan:
    if scan.tars and not scan.images:
        tars = [replace(file, path=f"{root}/{file.path}") for file in scan.tars]
        return _plan_tars(corpus, tars, scan.skipped, progress)
    for tar in scan.tars:
        scan.skipped[passed_over(tar.path) if is_gzip_tar(tar.path) else "tar: .tar"] += 1
    classes = _class_names(scan.images)
    labels = {name: label for label, name in enumerate(classes)}
    keys = keys_of([text_of(file.path) for file in scan.images])
    files = [
        ImageFile(file.path, key, labels[file.path.split("/", 1)[0]] if classes else None, file.num_bytes, file.etag)
        for file, key in zip(scan.images, keys, strict=True)
    ]
    shards = [
        _bundle(index, root, tuple(files[start : start + FILES_PER_SHARD]))
        for index, start in enumerate(range(0, len(files), FILES_PER_SHARD))
    ]
    return Plan(corpus, tuple(shards), tuple(map(text_of, classes)), dict(sorted(scan.skipped.items())), {})


def _class_names(images: Sequence[FoundFile]) -> list[str]:
    """Names of the first folder level, sorted as bytes; none when an image lies outside them."""
    if any("/" not in file.path for file in images):
        return []
    return sorted({file.path.split("/", 1)[0] for file in images}, key=os.fsencode)


def _plan_tars(
    corpus: str, tars: Sequence[FoundFile], skipped: Counter[str], progress: Callable[[int, int], None] | None
) -> Plan:
    """Walks through the tars, whose `path` is absolute or an address."""
    repeated = [path for path, count in Counter(tar.path for tar in tars).items() if count > 1]
    if repeated:
        raise CorpusError(f"{corpus}: {repeated[0]} is named more than once. Name every shard once.")
    common = os.path.commonpath([os.path.dirname(tar.path) for tar in tars])
    names = read_class_names(common.replace(":/", "://", 1) if is_address(tars[0].path) else common)
    if names is not None:
        skipped = skipped - Counter([passed_over(CLASSES_FILE)])
    tally = Tally(skipped=skipped)
    shards: list[InputShard] = []
    with ThreadPoolExecutor(WALKERS, thread_name_prefix="walk") as walkers:
        walked = walkers.map(_walked, tars) if is_address(tars[0].path) else map(_walked, tars)
        for tar, (num_samples, met) in zip(tars, walked, strict=True):
            tally.add(met)
            name = text_of(os.path.relpath(tar.path, common))
            shards.append(InputShard(len(shards), name, num_samples, tar.num_bytes, TarFile(tar.path, etag=tar.etag)))
            if progress is not None:
                progress(len(shards), len(tars))
    return Plan(
        corpus, tuple(shards), names or (), dict(sorted(tally.skipped.items())), dict(sorted(tally.unused.items()))
    )


def _walked(tar: FoundFile) -> tuple[int, Tally]:
    """How many samples a tar has, and what is in it beside them."""
    tally = Tally()
    try:
        with open_tar(tar.path, tar.num_bytes, tar.etag, once=True) as file:
            return sum(1 for _ in walk_samples(file, tally, load=False)), tally
    except OSError as error:
        why = error.strerror or str(error)
        raise CorpusError(f"{tar.path}: cannot be read ({why}). Grant access, or leave it out.") from error


def _plan_published(corpus: str) -> Plan:
    splits, class_names = find_published(corpus)
    shards: list[InputShard] = []
    for files in splits:
        for start in range(0, files.num_samples, ROWS_PER_SHARD):
            shards.append(_idx_range(len(shards), files, start, min(start + ROWS_PER_SHARD, files.num_samples)))
    return Plan(corpus, tuple(shards), class_names, {}, {})


def _facts(file: ImageFile) -> list[object]:
    facts: list[object] = [file.key, text_of(file.path), file.label, file.num_bytes]
    return [*facts, file.etag] if file.etag else facts


def _bundle(index: int, root: str, files: tuple[ImageFile, ...]) -> InputShard:
    num_bytes = sum(file.num_bytes for file in files)
    return InputShard(index, f"files-{index:06d}", len(files), num_bytes, FileBundle(root, files))


def _idx_range(index: int, files: IdxFiles, start: int, stop: int) -> InputShard:
    num_bytes = (stop - start) * files.shape[0] * files.shape[1]
    return InputShard(index, f"{files.split}[{start}:{stop}]", stop - start, num_bytes, IdxRange(files, start))


def _part(shard: InputShard, index: int, start: int, stop: int) -> InputShard:
    """Samples start..stop-1 of an input shard."""
    match shard.content:
        case FileBundle(root=root, files=files):
            return _bundle(index, root, files[start:stop])
        case IdxRange(files=files, start=first):
            return _idx_range(index, files, first + start, first + stop)
        case TarFile() if (start, stop) == (0, shard.num_samples):
            return replace(shard, index=index)
        case TarFile(path=path, start=first, whole=whole):
            whole, first, last = whole or shard, first + start, first + stop
            before, behind = (whole.num_bytes * place // whole.num_samples for place in (first, last))
            name = f"{whole.name}[{first}:{last}]"
            return InputShard(index, name, stop - start, behind - before, TarFile(path, first, whole))
        case Retried():
            raise AssertionError("a corpus is cut before samples of it are tried again")
