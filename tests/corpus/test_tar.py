"""The tar reader against webdataset's on good tars, and against damage of every kind."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.corpus.grouping import MAX_SAMPLE_MEMBERS, Tally, TarSample, walk_samples
from pipelines.corpus.problems import Reason


def make_tar(members: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


class Unseekable(io.RawIOBase):
    """A stream as a network gives it."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._inner.readinto(buffer)


def streams(data: bytes) -> list[BinaryIO]:
    return [io.BytesIO(data), io.BufferedReader(Unseekable(data))]


def walk(data: bytes, tally: Tally | None = None) -> list[TarSample]:
    """Walks in every way there is, and sees that they agree."""
    tally = tally if tally is not None else Tally()
    samples = list(walk_samples(io.BytesIO(data), tally))
    for load in (True, False):
        for stream in streams(data):
            others = list(walk_samples(stream, Tally(), load=load))
            assert [(s.key, s.index, s.problem and s.problem.reason) for s in others] == [
                (s.key, s.index, s.problem and s.problem.reason) for s in samples
            ]
            if load:
                assert [s.image and s.image.data for s in others] == [s.image and s.image.data for s in samples]
    assert [s.index for s in samples] == list(range(len(samples)))
    return samples


def test_agrees_with_webdataset(shards: Path) -> None:
    tars = [path.read_bytes() for path in sorted(shards.glob("*.tar"))]
    files = tar_file_expander({"url": "", "stream": io.BytesIO(data)} for data in tars)
    theirs = list(group_by_keys(files))
    ours = [sample for data in tars for sample in walk_samples(io.BytesIO(data), Tally())]
    assert len(ours) == len(theirs) == 30
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.key, *(part.data for part in mine.parts)) == tuple(
            other[name] for name in ("__key__", "png", "cls", "txt", "json")
        )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_long_names_of_every_dialect(form: int) -> None:
    name = "/".join(["folder" * 5] * 5) + "/a"
    name = name if form == tarfile.USTAR_FORMAT else "ü" * 200 + name
    (sample,) = walk(make_tar({name + ".jpg": b"image", name + ".cls": b"3"}, form))
    assert sample.key == name
    assert sample.image is not None
    assert sample.image.data == b"image"


def test_pax_and_base_256_sizes_are_believed() -> None:
    plain = bytearray(make_tar({"a.jpg": b"x" * 600, "b.jpg": b"y"}))
    plain[124:136] = b"\x80" + (600).to_bytes(11, "big")
    plain[148:156] = b" " * 8
    plain[148:156] = b"%06o\0 " % sum(plain[:512])
    assert [sample.key for sample in walk(bytes(plain))] == ["a", "b"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a.jpg")
        entry.size, entry.pax_headers = 3, {"size": "3", "comment": "x=y\nz"}
        tar.addfile(entry, io.BytesIO(b"abc"))
    (sample,) = walk(file.getvalue())
    assert sample.image is not None
    assert sample.image.data == b"abc"


def test_names_follow_webdataset() -> None:
    samples = walk(make_tar({"d.1/a.b.0.JPG": b"1", "d.1/a.b.0.cls": b"2", "d.2/a.left.png": b"3", "d.2/a.png": b"4"}))
    assert [sample.key for sample in samples] == ["d.1/a", "d.2/a"]
    assert samples[0].label is not None
    assert [sample.image and sample.image.data for sample in samples] == [b"1", b"4"]


def test_links_folders_and_strangers_are_counted_never_followed() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "a.jpg"),
            (tarfile.LNKTYPE, "b.jpg"),
            (tarfile.DIRTYPE, "c.jpg"),
            (tarfile.CHRTYPE, "d.jpg"),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        for name in ("README", "._e.jpg", "../../e.jpg", "../../e.npy"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
    tally = Tally()
    (sample,) = walk(file.getvalue(), tally)
    assert sample.key == "../../e"
    assert tally.skipped == {
        "tar member: symbolic link": 1, "tar member: hard link": 1, "tar member: device": 1, "tar member: no extension": 1,
    }  # fmt: skip
    assert tally.unused == {"tar member: directory": 1, "tar member: hidden": 1, "not an image: .npy": 1}


def test_a_key_met_again_is_never_mixed() -> None:
    samples = walk(make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3"), ("a.jpg", b"4"), ("c.jpg", b"5")]))
    assert [(s.key, s.problem and s.problem.reason) for s in samples] == [
        ("a", None), ("b", None), ("a", Reason.DUPLICATE_KEY), ("c", None),
    ]  # fmt: skip
    assert samples[0].label is None


def test_a_repeated_extension_makes_all_rows_of_its_run_uncertain() -> None:
    # The first `a.jpg` has lost its label; were it believed, it would be given the second one's.
    members = [("a.jpg", b"1"), ("a.cls", b"2"), ("a.jpg", b"3"), ("a.JPG", b"4"), ("b.jpg", b"5")]
    samples = walk(make_tar(members))
    assert [(s.key, s.problem and s.problem.reason) for s in samples] == [
        ("a", Reason.DUPLICATE_KEY), ("a", Reason.DUPLICATE_KEY), ("a", Reason.DUPLICATE_KEY), ("b", None),
    ]  # fmt: skip


def test_images_that_share_a_key_by_their_dots_are_refused() -> None:
    (sample,) = walk(make_tar({"img.0001.jpg": b"1", "img.0002.jpg": b"2"}))
    assert sample.problem is not None
    assert sample.problem.reason is Reason.AMBIGUOUS_IMAGE
    (sample,) = walk(make_tar({f"img.{n}.jpg": b"" for n in range(MAX_SAMPLE_MEMBERS + 9)}))
    assert sample.problem is not None
    assert "share this key" in sample.problem.detail


GOOD = make_tar({f"{key}.{extension}": key.encode() * 300 for key in "abc" for extension in ("cls", "jpg")})


def test_damage_keeps_what_came_before_and_names_the_byte() -> None:
    third_header = 2 * (512 + 512)
    broken = bytearray(GOOD)
    broken[third_header + 10] ^= 1
    samples = walk(bytes(broken))
    assert [(s.key, s.problem and s.problem.reason) for s in samples] == [
        ("a", None),
        (f"@{third_header}", Reason.DAMAGED_TAR),
    ]
    assert str(third_header) in samples[-1].problem.detail


@pytest.mark.parametrize("length", range(0, 6 * 1024 + 513, 171))
def test_a_cut_tar_ends_with_a_truncated_row(length: int) -> None:
    samples = walk(GOOD[:length])
    whole = [s for s in samples if s.problem is None]
    if length == 6 * 1024 + 512:  # one block of zeros: the end-of-archive mark, if a short one
        assert len(whole) == len(samples) == 3
        return
    assert [s.key for s in whole] == list("abc")[: len(whole)]
    assert samples[-1].problem is not None
    assert samples[-1].problem.reason is Reason.TRUNCATED
    assert len(samples) == len(whole) + 1


def test_absurd_sizes_end_the_walk_without_reading() -> None:
    huge = bytearray(make_tar({"a.jpg": b"1", "b.jpg": b"2"}))
    huge[1024 + 124 : 1024 + 136] = b"\x80" + (2**80).to_bytes(11, "big")
    huge[1024 + 148 : 1024 + 156] = b" " * 8
    huge[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(huge[1024:1536])
    samples = list(walk_samples(io.BytesIO(bytes(huge)), Tally()))
    assert [(s.key, s.problem and s.problem.reason) for s in samples] == [("a", None), ("b", Reason.TRUNCATED)]


def test_empty_joined_and_padded_tars() -> None:
    assert walk(bytes(10240)) == []
    assert walk(b"")[0].problem.reason is Reason.TRUNCATED
    assert [s.key for s in walk(GOOD + make_tar({"d.jpg": b"1"}))] == ["a", "b", "c", "d"]
    rubbish = walk(GOOD + b"rubbish" * 100)
    assert [s.problem and s.problem.reason for s in rubbish] == [None, None, None, Reason.DAMAGED_TAR]


def test_a_sample_over_the_cap_is_a_row_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpus.grouping.MAX_SAMPLE_BYTES", 1000)
    samples = walk(make_tar({"a.jpg": b"x" * 1001, "b.jpg": b"y" * 1000, "c.jpg": b"z", "c.npy": b"n" * 2000}))
    assert [s.problem and s.problem.reason for s in samples] == [Reason.TOO_MANY_BYTES, None, None]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_damage_raises_or_mixes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    touched = {place // 512 for place, _ in changes}
    for sample in walk(bytes(data)):
        if sample.problem is None and sample.image is not None and sample.image.offset // 512 not in touched:
            headers = {part.offset // 512 - 1 for part in sample.parts}
            if not headers & touched:
                assert sample.image.data == sample.key.encode() * 300


def test_start_gives_the_same_rows_without_reading_the_first(make_picture: Callable[..., bytes]) -> None:
    data = make_tar([(f"{n % 7}.png", make_picture(n)) for n in range(9)])
    whole = list(walk_samples(io.BytesIO(data), Tally()))
    for start in range(10):
        assert list(walk_samples(io.BytesIO(data), Tally(), start)) == whole[start:]
