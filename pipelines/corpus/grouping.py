"""Members of a tar become samples, by the naming rules of webdataset, strictly: nothing is lost and no two samples are mixed.

A key is the path up to the first dot of its last part; the rest is the extension. Members of one key that follow each other are one sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import BinaryIO

from pipelines.corpus.names import IMAGE_EXTENSIONS, passed_over
from pipelines.corpus.problems import Problem, Reason
from pipelines.corpus.tar import Member, TarDamage, TarStream

FURTHER_IMAGE = "a further image of its sample"
MAX_SAMPLE_BYTES = 256 << 20  # of the members of one sample that are read; a 100-megapixel photograph has about 50 MB
MAX_SAMPLE_MEMBERS = 4096
SHORT_TEXT = 512  # bytes: labels, and captions of a sentence or two
_TEXTS = ("cls", "txt", "json")


@dataclass(frozen=True, slots=True)
class Part:
    """One member that a sample uses.

    Attributes:
        offset: where its data begins in the tar, in bytes.
        size: in bytes.
        data: its bytes; None when they were not read.
    """

    offset: int
    size: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class TarSample:
    """One sample of a tar, or one row that says what was lost.

    Attributes:
        key: as in the tar; `@BYTE` for damage that belongs to no sample.
        index: its place in the tar; problem rows are counted.
        image, label, caption, json: its members, where there are such.
        problem: why it cannot be used, else None.
    """

    key: str
    index: int
    image: Part | None = None
    label: Part | None = None
    caption: Part | None = None
    json: Part | None = None
    problem: Problem | None = None

    @property
    def parts(self) -> list[Part]:
        """The members that are there."""
        return [part for part in (self.image, self.label, self.caption, self.json) if part is not None]


@dataclass
class Tally:
    """What was met in a tar beside its samples, by what it is.

    Attributes:
        skipped: what might have been samples: links, files without a key.
        unused: what belongs to samples or to the tar itself: directories, members that nothing reads.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Counts what was met in another tar, too."""
        self.skipped.update(other.skipped)
        self.unused.update(other.unused)


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the lower-cased extension of a member's name; None for a name that has none.

    >>> split_name("cats/0001.left.JPG")
    ('cats/0001', 'left.jpg')
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= name.rfind("/") + 1 or dot == len(name) - 1:
        return None
    return name[:dot], name[dot + 1 :].lower()


def _kind(extension: str) -> str:
    """What a member is: `jpg` for the extension `b.0000.jpg`."""
    return extension.rsplit(".", 1)[-1]


@dataclass
class _Group:
    """Members of one key, as they come."""

    key: str
    index: int
    problem: Problem | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, extension: str, member: Member, tar: TarStream, load: bool) -> None:
        read = _is_read(extension)
        self.num_bytes += member.size if read else 0
        if self.num_bytes > MAX_SAMPLE_BYTES:
            what = f"more than {MAX_SAMPLE_BYTES} bytes in one sample, at {member.name!r} (byte {member.offset})"
            self.fail(Problem(Reason.TOO_MANY_BYTES, what))
        if len(self.parts) == MAX_SAMPLE_MEMBERS:
            what = f"more than {MAX_SAMPLE_MEMBERS} members share this key; a key ends at the first dot of the name"
            self.fail(Problem(Reason.AMBIGUOUS_IMAGE, what))
            return
        wanted = read and self.problem is None and (load or (member.size <= SHORT_TEXT and _kind(extension) in _TEXTS))
        self.parts[extension] = Part(member.offset, member.size, tar.read(member) if wanted else None)

    def fail(self, problem: Problem) -> None:
        """Makes this a row without data; the names stay, since they tell where the next sample begins."""
        if self.problem is None:
            self.problem = problem
            self.parts = {extension: replace(part, data=None) for extension, part in self.parts.items()}

    def finish(self, tally: Tally) -> TarSample:
        """Chooses the members that mean something."""
        if self.problem is not None:
            return TarSample(self.key, self.index, problem=self.problem)
        roles = _roles(tuple(self.parts))
        if isinstance(roles, Problem):
            return TarSample(self.key, self.index, problem=roles)
        for what in roles.unused:
            tally.unused[what] += 1
        label, caption, json = (self.parts.get(extension) for extension in roles.texts)
        return TarSample(self.key, self.index, self.parts[roles.image], label, caption, json)


@dataclass(frozen=True, slots=True)
class _Roles:
    """What the members of a sample are, by extension: label, caption and JSON are empty where there is none."""

    image: str
    texts: tuple[str, ...]
    unused: tuple[str, ...]


@lru_cache(maxsize=1024)  # the samples of a tar are nearly all alike
def _roles(extensions: tuple[str, ...]) -> _Roles | Problem:
    images = [extension for extension in extensions if _kind(extension) in IMAGE_EXTENSIONS]
    plain = [extension for extension in images if extension in IMAGE_EXTENSIONS]
    if not images:
        held = ", ".join("." + extension for extension in extensions[:8])
        return Problem(Reason.MISSING_IMAGE, f"the sample holds only {held}")
    if not plain and len(images) > 1:
        what = (
            f".{images[0]}, .{images[1]}: a key ends at the first dot of the name, "
            "so these belong to one sample, and none of them is its plain image"
        )
        return Problem(Reason.AMBIGUOUS_IMAGE, what)
    chosen = (plain or images)[0]
    stem = chosen.removesuffix(_kind(chosen))  # `b.0000.` of `b.0000.jpg`, whose label is `b.0000.cls`
    texts = tuple(next((name for name in (stem + text, text) if name in extensions), "") for text in _TEXTS)
    others = [extension for extension in extensions if extension not in (chosen, *texts)]
    unused = tuple(FURTHER_IMAGE if name in images else passed_over("x." + name) for name in others)
    return _Roles(chosen, texts, unused)


@lru_cache(maxsize=1024)
def _is_read(extension: str) -> bool:
    return _kind(extension) in IMAGE_EXTENSIONS or _kind(extension) in _TEXTS


def walk_samples(stream: BinaryIO, tally: Tally, start: int = 0, load: bool = True) -> Iterator[TarSample]:
    """All samples of a tar in order, and a row for everything that is wrong with it.

    Args:
        stream: the tar from its start; one that can seek is faster to skip through.
        tally: counts what is passed over.
        start: samples before this index are walked past, unread.
        load: whether to read the data of the members that samples use; short texts, which cost nothing here, are read anyway.

    Never raises for what the tar holds. Damage ends the walk with one row: of the sample it falls into, else of the key `@BYTE`.
    """
    for sample in _walk(TarStream(stream), tally, start, load):
        if sample.index >= start:
            yield sample


def _walk(tar: TarStream, tally: Tally, start: int, load: bool) -> Iterator[TarSample]:
    seen: set[str] = set()
    group: _Group | None = None
    index = 0
    try:
        for member in tar:
            named = _named(member, tally)
            if named is None:
                continue
            key, extension = named
            if group is not None and key == group.key and extension not in group.parts:
                group.add(extension, member, tar, load and group.index >= start)
                continue
            problem = None
            if group is not None:
                if key == group.key:  # some member came twice: which of them belong together cannot be known
                    what = f"the key has two members .{extension} (byte {member.offset})"
                    problem = Problem(Reason.DUPLICATE_KEY, what)
                    group.problem = problem
                finished, group = group.finish(tally), None
                yield finished
                index += 1
            if problem is None and key in seen:
                problem = Problem(Reason.DUPLICATE_KEY, f"the key was used before in this tar (byte {member.offset})")
            seen.add(key)
            group = _Group(key, index, problem)
            group.add(extension, member, tar, load and index >= start)
    except TarDamage as damage:
        problem = Problem(damage.reason, damage.detail)
        named = split_name(damage.name) if damage.name else None
        if group is not None:
            finished = group.finish(tally)
            torn = named is not None and named[0] == group.key
            if torn or (finished.problem is not None and finished.problem.reason is Reason.MISSING_IMAGE):
                yield TarSample(group.key, index, problem=problem)  # the sample that the damage falls into
                return
            yield finished
            index += 1
        yield TarSample(named[0] if named else f"@{damage.offset}", index, problem=problem)
        return
    if group is not None:
        yield group.finish(tally)


def _named(member: Member, tally: Tally) -> tuple[str, str] | None:
    """The key and extension of a member; one that has none is counted."""
    if member.special is not None:
        where = tally.unused if member.special == "directory" else tally.skipped
        where[f"tar member: {member.special}"] += 1
        return None
    named = split_name(member.name)
    if named is None:
        hidden = member.name.rsplit("/", 1)[-1].startswith(".")
        (tally.unused if hidden else tally.skipped)["tar member: hidden" if hidden else "tar member: no extension"] += 1
    return named
