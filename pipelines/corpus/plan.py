"""Turns what a user calls a corpus into a fixed list of input shards, before any work is done on it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from pipelines.corpus.braces import expand_braces
from pipelines.corpus.folder import FoundFile, scan_folder
from pipelines.corpus.grouping import Tally, walk_samples
from pipelines.corpus.names import text_of
from pipelines.corpus.problems import CorpusError, Problem
from pipelines.corpus.published import PREFIX, IdxFiles, find_published
from vqmill.kinds import held_by, kind_of

FILES_PER_SHARD = 256
ROWS_PER_SHARD = 1024
FORMS = "a folder of images, tar shards (x/{000..009}.tar, x/*.tar, or a folder of them), or torchvision:FashionMNIST?root=PATH&split=train"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of a folder.

    Attributes:
        path: relative to the folder, as the file system gives it.
        key: unique in the corpus.
        label: the number of its class folder, None when the folder has no classes.
        num_bytes: its size when the corpus was planned.
    """

    path: str
    key: str
    label: int | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileBundle:
    """Loose files, read one at a time. `root` is the folder, absolute."""

    root: str
    files: tuple[ImageFile, ...]


@dataclass(frozen=True, slots=True)
class TarFile:
    """A local tar, or a part of it.

    Attributes:
        path: absolute.
        start: the first of its samples.
        whole: the input shard of the whole tar, for a part.
    """

    path: str
    start: int = 0
    whole: InputShard | None = None


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

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of its names, sizes and labels; paths outside the corpus and times have no part in it."""
        facts: list[object] = [self.kind, self.name, self.num_samples, self.num_bytes]
        if isinstance(self.content, FileBundle):
            facts.append([[file.key, text_of(file.path), file.label, file.num_bytes] for file in self.content.files])
        elif isinstance(self.content, TarFile) and self.content.whole:
            facts.append(self.content.whole.digest)  # of a tar that has changed, no part is as it was
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


def plan_corpus(corpus: str, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Lists the input shards of a corpus. Headers of tars are walked through; no image is read.

    Args:
        corpus: a folder of images (searched deeply; when every image lies in a subfolder, the first level names the classes),
            tar shards (a path, a glob, braces, or a folder that holds tars and no images), or
            `torchvision:NAME?root=PATH&split=train|test|all`.
        progress: called with (tars walked, of how many).

    Raises:
        CorpusError: there is nothing there, or nothing that is read; the message says what to do.
    """
    if corpus.startswith(PREFIX):
        plan = _plan_published(corpus)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", corpus):
        raise CorpusError(f"{corpus}: only local files are read. Copy the corpus to a disk first. A corpus is {FORMS}.")
    elif Path(corpus).is_dir():
        plan = _plan_folder(corpus, progress)
    else:
        plan = _plan_tars(corpus, _expand(corpus), Counter(), progress)
    if plan.num_samples == 0:
        passed = ", ".join(f"{count} x {what}" for what, count in sorted(plan.skipped.items()))
        raise CorpusError(
            f"{corpus}: no sample in it{f' (passed over: {passed})' if passed else ''}. A corpus is {FORMS}."
        )
    return plan


def _plan_folder(corpus: str, progress: Callable[[int, int], None] | None) -> Plan:
    root = Path(corpus).absolute()
    if kind_of(root):  # the pictures in it are no corpus
        raise CorpusError(f"{corpus}: not a corpus: {held_by(Path(corpus))}. A corpus is {FORMS}.")
    scan = scan_folder(root)
    if scan.tars and not scan.images:
        return _plan_tars(corpus, [str(root / file.path) for file in scan.tars], scan.skipped, progress)
    if scan.tars:
        scan.skipped["tar: .tar"] += len(scan.tars)
    classes = _class_names(scan.images)
    labels = {name: label for label, name in enumerate(classes)}
    keys = _keys([text_of(file.path) for file in scan.images])
    files = [
        ImageFile(file.path, key, labels[file.path.split("/", 1)[0]] if classes else None, file.num_bytes)
        for file, key in zip(scan.images, keys, strict=True)
    ]
    shards = [
        _bundle(index, str(root), tuple(files[start : start + FILES_PER_SHARD]))
        for index, start in enumerate(range(0, len(files), FILES_PER_SHARD))
    ]
    return Plan(corpus, tuple(shards), tuple(map(text_of, classes)), dict(sorted(scan.skipped.items())), {})


def _class_names(images: Sequence[FoundFile]) -> list[str]:
    """Names of the first folder level, sorted as bytes; none when an image lies outside them."""
    if any("/" not in file.path for file in images):
        return []
    return sorted({file.path.split("/", 1)[0] for file in images}, key=os.fsencode)


def _keys(paths: Sequence[str]) -> list[str]:
    """Paths without their extension; with it where that would not be unique (`a.jpg` beside `a.png`)."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(stems)
    whole = set(paths)
    if len(whole) < len(paths):
        raise CorpusError("Two file names differ only in how they spell bytes that are not UTF-8. Rename one of them.")
    return [path if counts[stem] > 1 or stem in whole else stem for path, stem in zip(paths, stems, strict=True)]


def _expand(corpus: str) -> list[str]:
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
        if not Path(name).is_file() or not name.lower().endswith(".tar"):
            what = "a folder" if Path(name).is_dir() else "not a .tar (packed ones must be unpacked to .tar first)"
            raise CorpusError(f"{corpus}: {name} is {what}. A corpus is {FORMS}.")
    return [str(Path(name).absolute()) for name in names]


def _plan_tars(
    corpus: str, paths: list[str], skipped: Counter[str], progress: Callable[[int, int], None] | None
) -> Plan:
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise CorpusError(f"{corpus}: {repeated[0]} is named more than once. Name every shard once.")
    tally = Tally(skipped=skipped)
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    shards = []
    for path in paths:
        name = text_of(os.path.relpath(path, common))
        try:
            with open(path, "rb") as file:
                num_samples = sum(1 for _ in walk_samples(file, tally, load=False))
                num_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror}). Grant access, or leave it out.") from error
        shards.append(InputShard(len(shards), name, num_samples, num_bytes, TarFile(path)))
        if progress is not None:
            progress(len(shards), len(paths))
    return Plan(corpus, tuple(shards), (), dict(sorted(tally.skipped.items())), dict(sorted(tally.unused.items())))


def _plan_published(corpus: str) -> Plan:
    splits, class_names = find_published(corpus)
    shards: list[InputShard] = []
    for files in splits:
        for start in range(0, files.num_samples, ROWS_PER_SHARD):
            shards.append(_idx_range(len(shards), files, start, min(start + ROWS_PER_SHARD, files.num_samples)))
    return Plan(corpus, tuple(shards), class_names, {}, {})


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
