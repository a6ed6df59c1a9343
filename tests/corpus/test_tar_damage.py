"""Valid tars cut, flipped and spliced at random: nothing hangs, mixes, or is lost without a row."""

from __future__ import annotations

import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.corpus.grouping import Part, Tally, TarSample, walk_samples
from pipelines.corpus.names import IMAGE_EXTENSIONS

KEYS = [f"folder.{number % 2}/{number:03d}" for number in range(6)]
EXTENSIONS = ("cls", "jpg", "json", "txt")


def content(key: str, extension: str) -> bytes:
    """Tells which member it belongs to, and spans more than one block."""
    return f"{key}.{extension} ".encode() * (40 if extension == "jpg" else 1)


def by_tarfile(form: int, keys: list[str] = KEYS) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for key in keys:
            for extension in EXTENSIONS:
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content(key, extension))
                entry.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(entry, io.BytesIO(content(key, extension)))
    return file.getvalue()


def by_webdataset(keys: list[str] = KEYS) -> bytes:
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False) as writer:
        for key in keys:
            writer.write({"__key__": key, **{extension: content(key, extension) for extension in EXTENSIONS}})
    return file.getvalue()


TARS = {
    "ustar": by_tarfile(tarfile.USTAR_FORMAT),
    "gnu": by_tarfile(tarfile.GNU_FORMAT),
    "pax": by_tarfile(tarfile.PAX_FORMAT),
    "webdataset": by_webdataset(),
}
OTHER_KEYS = [f"other/{number:03d}" for number in range(6)]
OTHERS = {
    "ustar": by_tarfile(tarfile.USTAR_FORMAT, OTHER_KEYS),
    "gnu": by_tarfile(tarfile.GNU_FORMAT, OTHER_KEYS),
    "pax": by_tarfile(tarfile.PAX_FORMAT, OTHER_KEYS),
    "webdataset": by_webdataset(OTHER_KEYS),
}
kinds = st.sampled_from(sorted(TARS))


def walk(data: bytes) -> list[TarSample]:
    samples = list(walk_samples(io.BytesIO(data), Tally()))
    assert [sample.index for sample in samples] == list(range(len(samples)))
    assert all(sample.problem is None or sample.problem.detail for sample in samples)
    return samples


def is_whole(sample: TarSample) -> bool:
    parts = (sample.label, sample.image, sample.json, sample.caption)
    data = [part.data if part else None for part in parts]
    return sample.problem is None and data == [content(sample.key, extension) for extension in EXTENSIONS]


def ends() -> dict[str, list[int]]:
    """Where the samples of each tar end."""
    return {kind: [_end(sample) for sample in walk(data)] for kind, data in TARS.items()}


def _end(sample: TarSample) -> int:
    return max(part.offset + part.size for part in sample.parts)


ENDS = ends()


@given(kinds, st.floats(0, 1, exclude_max=True))
@settings(deadline=2000, max_examples=200)
def test_cut_anywhere_the_complete_samples_before_are_kept_and_the_rest_has_a_row(kind: str, share: float) -> None:
    data = TARS[kind]
    length = int(share * len(data))
    samples = walk(data[:length])
    complete = sum(end <= length for end in ENDS[kind])
    certain = max(complete - 1, 0)
    assert [sample.key for sample in samples[:certain]] == KEYS[:certain]
    assert all(is_whole(sample) for sample in samples[:certain])
    if complete:  # the last one may look as if more members of it were lost
        assert samples[complete - 1].key == KEYS[complete - 1]
        assert is_whole(samples[complete - 1]) or samples[complete - 1].problem is not None
    if length < ENDS[kind][-1]:
        assert samples[-1].problem is not None
    assert all(part.data in {content(s.key, e) for e in EXTENSIONS} for s in samples for part in s.parts)


@given(kinds, st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
@settings(deadline=2000, max_examples=200)
def test_with_bits_flipped_no_sample_before_is_lost_and_no_sample_is_mixed(
    kind: str, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(TARS[kind])
    places = [int(share * len(data)) for share, _ in flips]
    for place, (_, change) in zip(places, flips, strict=True):
        data[place] ^= change
    samples = walk(bytes(data))
    before = sum(end <= min(places) - 512 for end in ENDS[kind])  # a pax header before a member belongs to it
    assert all(is_whole(sample) for sample in samples[: max(before - 1, 0)])
    assert [sample.key for sample in samples[: max(before - 1, 0)]] == KEYS[: max(before - 1, 0)]
    for sample in samples:
        names = {_name(part.data) for part in sample.parts if part.data and not _touched(part, places)}
        assert len({name.rsplit(".", 1)[0] for name in names if name}) <= 1, sample


def _name(data: bytes) -> str:
    return data.split(b" ", 1)[0].decode("utf-8", "replace")


def _touched(part: Part, places: list[int]) -> bool:
    """Whether the part, or a header that may lie before it, was changed."""
    return any(part.offset - 2048 <= place < part.offset + part.size for place in places)


@given(kinds, kinds, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=2000, max_examples=200)
def test_two_tars_spliced_never_share_a_sample(first: str, second: str, until: float, since: float) -> None:
    one = TARS[first][: int(until * len(TARS[first]))]
    other = OTHERS[second]
    samples = walk(one + other[int(since * len(other)) // 512 * 512 :])
    certain = max(sum(end <= len(one) - 512 for end in ENDS[first]) - 1, 0)
    assert [sample.key for sample in samples[:certain]] == KEYS[:certain]
    assert all(is_whole(sample) for sample in samples[:certain])
    members = {content(key, extension): key for key in KEYS + OTHER_KEYS for extension in EXTENSIONS}
    for sample in samples:
        # A member that the cut went through may hold what follows; whole ones belong to their sample alone.
        assert {members[part.data] for part in sample.parts if part.data in members} <= {sample.key}


names = st.lists(
    st.tuples(
        st.sampled_from(["a", "b/a", "b.c/a", "b.c/d.e/a", "./a", "Ü/a"]),
        st.sampled_from(["jpg", "JPG", "Png", "cls", "left.jpg", "x.y.Txt", "json", "seg.PNG"]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda name: (name[0], name[1].lower()),
)  # fmt: skip


@given(names, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(deadline=2000, max_examples=150)
def test_keys_and_members_are_webdatasets(members: list[tuple[str, str]], form: int) -> None:
    members.sort(key=lambda member: member[0])  # webdataset, too, wants a sample's members in a row
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for key, extension in members:
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(content(key, extension))
            tar.addfile(entry, io.BytesIO(content(key, extension)))
    theirs = list(group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(file.getvalue())}])))
    ours = walk(file.getvalue())
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        plain = [name for name in other if name in IMAGE_EXTENSIONS]
        if plain:
            assert mine.image is not None
            assert mine.image.data == other[plain[0]]
        if mine.problem is None and "cls" in other and mine.image is not None and plain:
            assert mine.label is not None
            assert mine.label.data == other["cls"]


@pytest.mark.parametrize("kind", sorted(TARS))
def test_whole_they_are_read_whole(kind: str) -> None:
    assert [sample.key for sample in walk(TARS[kind])] == KEYS
    assert all(is_whole(sample) for sample in walk(TARS[kind]))
