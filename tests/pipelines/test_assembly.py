"""Stores that grow and stores that have lost files, without Ray: whatever was killed or deleted, the bytes are those of one quiet run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import vqmill
from pipelines.assembly import ArrivedSpan, Order, SpanFacts, Written, carry_out, extend, mend
from pipelines.encoder import Span
from vqmill import LevelSpec
from vqmill import places as places_module
from vqmill.commits import Commit, Counts, Cursor
from vqmill.errors import CodesError, UsageError
from vqmill.layout import group_metadata, read_spec, smallest_codec
from vqmill.spec import CODECS, Segment, StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.verify import verify_store
from vqmill.writer import StoreWriter, read_shard

LEVELS = (LevelSpec("top", 300, (2, 2)), LevelSpec("bottom", 200, (3, 4)))
Corpus = list[list[tuple[int, int]]]  # by input shard, by span: (good samples, bad samples)
SEAM: Corpus = [[(7, 1), (4, 0)], [(0, 2)]]  # 11 rows; the last span has nothing but bad samples
MORE: Corpus = [*SEAM, [], [(0, 1), (6, 0)], [(5, 2)]]
MOST: Corpus = [*MORE, [(0, 3)], [(9, 0)]]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def span_of(corpus: Corpus, unit: int, index: int) -> Span:
    good, bad = corpus[unit][index]
    generator = np.random.default_rng((unit, index))
    place = {"source": f"{unit}.tar", "input_shard": unit}
    rows = [
        {**place, "key": f"{unit}-{index}-{row}", "index": row, "label": row % 3, "caption": "é" * row, "width": 3, "height": 4}
        for row in range(good)
    ]  # fmt: skip
    lines = [{**place, "key": f"bad-{unit}-{index}-{row}", "index": good + row, "reason": "truncated", "detail": "cut"}
             for row in range(bad)]  # fmt: skip
    return Span(
        index,
        {
            level.name: generator.integers(0, level.codebook_size, (good, *level.grid)).astype(level.dtype)
            for level in LEVELS
            if good
        },
        pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA),
        pa.Table.from_pylist(lines, schema=QUARANTINE_SCHEMA),
    )


class Corpora:
    """Gives spans as `Encoders.between` does, and remembers which were asked for."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.encoded: list[tuple[int, int]] = []

    def between(self, start: Cursor, stop: Cursor) -> Iterator[ArrivedSpan]:
        for unit, spans in enumerate(self.corpus):
            for index in range(len(spans)):
                if (start.input_shard, start.span) <= (unit, index) < (stop.input_shard, stop.span + bool(stop.row)):
                    self.encoded.append((unit, index))
                    span = span_of(self.corpus, unit, index)
                    yield ArrivedSpan(unit, SpanFacts(index, span.samples.num_rows, span.counts), span)


@dataclass
class Inline:
    """Carries orders out when their results are asked for: as late as can be."""

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        return order, list(payloads)

    def ready(self, handle: Any) -> bool:
        return False

    def collect(self, handle: Any) -> Written:
        order, payloads = handle
        return carry_out(order, *payloads)


class Eager(Inline):
    """Carries orders out at once: as early as can be."""

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        return carry_out(order, *payloads)

    def ready(self, handle: Any) -> bool:
        return True

    def collect(self, handle: Any) -> Written:
        return handle


def num_samples(corpus: Corpus) -> int:
    return sum(good + bad for spans in corpus for good, bad in spans)


def digest(corpus: Corpus) -> str:
    return hashlib.sha256(repr(corpus).encode()).hexdigest()


def spec_of(corpus: Corpus, size: int, codec: str | None = "zstd") -> StoreSpec:
    return StoreSpec(
        LEVELS, size, {"fingerprint": "f"}, corpus={"description": "made up", "num_samples": num_samples(corpus)},
        segments=(Segment(digest(corpus), 0, 0, len(corpus), num_samples(corpus)),), codec=codec,
    )  # fmt: skip


def make(
    path: Path, corpus: Corpus, size: int, codec: str | None = "zstd", hands: Inline | None = None
) -> tuple[Path, Corpora]:
    """What tokenize does, with a corpus that is a true continuation."""
    spec, spans, hands = spec_of(corpus, size, codec), Corpora(corpus), hands or Inline()
    found = read_spec(path) if path.exists() else None
    with StoreWriter(path, spec.with_plan_of(found) if found else spec) as writer:
        if found and found.segments[-1].plan != digest(corpus):
            writer.grow(digest(corpus), len(corpus), num_samples(corpus), spec.corpus)
        if not writer.spec.complete:
            mend(writer, writer.missing_shards(), spans.between, hands)
            spans.encoded.append((-1, -1))
            extend(writer, spans.between(writer.cursor, Cursor(len(corpus))), len(corpus), hands)
            assert writer.counts.seen == num_samples(corpus)
            writer.finish()
    return path, spans


def tree(path: Path, *, segments: bool = False) -> dict[str, bytes]:
    """Every file's bytes; the group's metadata without its segments."""
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    if not segments:
        group = json.loads(files["zarr.json"])
        for key in ("segments", "sha256"):
            del group["attributes"]["vqmill"][key]
        files["zarr.json"] = json.dumps(group, sort_keys=True).encode()
    return files


def unfinished(path: Path) -> None:
    """What `vqmill repair` does to the group's metadata, beside deleting files."""
    spec = replace(read_spec(path), complete=False)
    (path / "zarr.json").write_bytes(group_metadata(spec))


def kill(monkeypatch: pytest.MonkeyPatch, after: int | None) -> list[Path]:
    """The process dies at write number `after`."""
    written: list[Path] = []
    write_whole = places_module.write_whole

    def write(path: Path, data: bytes) -> None:
        if len(written) == after:
            raise Killed
        write_whole(path, data)
        written.append(path)

    monkeypatch.setattr(places_module, "write_whole", write)
    return written


SIZES = [1, 4, 8, 11, 64]


@pytest.mark.parametrize("hands", [Inline(), Eager()])
@pytest.mark.parametrize("size", SIZES)
def test_appending_gives_the_bytes_of_one_run(tmp_path: Path, size: int, hands: Inline) -> None:
    path = tmp_path / "codes.zarr"
    for corpus in (SEAM, MORE, MOST):
        make(path, corpus, size, hands=hands)
        whole, _ = make(tmp_path / f"{len(corpus)}.zarr", corpus, size)
        assert tree(path) == tree(whole)
        assert verify_store(path).problems == ()
    spec = vqmill.open_codes(path).spec
    assert [(part.first_row, part.input_shards, part.num_samples) for part in spec.segments] == [
        (0, 2, 14),
        (11, 5, 28),
        (22, 7, 40),
    ]
    assert [part.first_commit for part in spec.segments] == [0, 11 // size, 22 // size]
    assert spec.corpus["num_samples"] == 40


@pytest.mark.parametrize("old", [[[(0, 3)]], [[(0, 3)], []]])
@pytest.mark.parametrize("codec", [None, "blosc-lz4"])
def test_a_store_without_rows_grows(tmp_path: Path, old: Corpus, codec: str | None) -> None:
    path, _ = make(tmp_path / "codes.zarr", old, 8, codec)
    assert read_spec(path).codec == (codec or CODECS[0])
    for more in ([*old, []], [*old, [], [(0, 2)]], [*old, [], [(0, 2)], [(20, 1)]]):
        make(path, more, 8, codec)
        whole, _ = make(tmp_path / f"{len(more)}-{num_samples(more)}.zarr", more, 8, codec)
        assert tree(path) == tree(whole)
    assert len(vqmill.open_codes(path)) == 20


@pytest.mark.parametrize(("size", "hands"), [(4, Eager()), (8, Inline()), (11, Eager())])
def test_appending_killed_at_every_write_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, hands: Inline
) -> None:
    old, _ = make(tmp_path / "old.zarr", SEAM, size)
    before = vqmill.open_codes(old)
    held = {name: before[name][:] for name in before.levels}
    whole = tree(make(shutil.copytree(old, tmp_path / "whole.zarr"), MORE, size)[0], segments=True)
    path = shutil.copytree(old, tmp_path / "counted.zarr")
    with monkeypatch.context() as patch:
        writes = kill(patch, None)
        make(path, MORE, size, hands=hands)
    for after in range(len(writes)):
        path = shutil.copytree(old, tmp_path / str(after) / "codes.zarr")
        reader = vqmill.open_codes(path)
        with monkeypatch.context() as patch:
            kill(patch, after)
            with pytest.raises(Killed):
                make(path, MORE, size, hands=hands)
        spec = read_spec(path)
        assert spec.segments[-1].first_row == (11 if len(spec.segments) == 2 else 0)
        assert spec.num_rows >= 11
        for codes in (reader, vqmill.open_codes(path, allow_incomplete=True)):
            for name, rows in held.items():
                np.testing.assert_array_equal(codes[name][:11], rows, err_msg=f"killed after {after} writes")
            np.testing.assert_array_equal(codes.label_array[:11], before.labels)
        make(path, MORE, size)
        assert tree(path, segments=True) == whole, f"killed after {after} writes"


def test_killed_twice_while_the_last_zarr_shard_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, 64)
    for after in (4, 3, 8):
        with monkeypatch.context() as patch:
            kill(patch, after)
            with pytest.raises(Killed):
                make(path, MORE, 64)
    make(path, MORE, 64)
    assert tree(path) == tree(make(tmp_path / "whole.zarr", MORE, 64)[0])


def test_an_unfinished_store_takes_a_longer_plan_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(make(tmp_path / "whole.zarr", MORE, 4)[0], segments=True)
    with monkeypatch.context() as patch:
        writes = kill(patch, None)
        make(tmp_path / "counted.zarr", SEAM, 4)
    for after in range(4, len(writes)):
        path = tmp_path / str(after) / "codes.zarr"
        with monkeypatch.context() as patch:
            kill(patch, after)
            with pytest.raises(Killed):
                make(path, SEAM, 4)
        if path.exists():
            make(path, MORE, 4)
            assert tree(path, segments=True) == whole, f"killed after {after} writes"


@pytest.mark.parametrize("size", [4, 8])
def test_what_was_lost_is_made_again_exactly(tmp_path: Path, size: int) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, size)
    make(path, MOST, size)
    expected = tree(path, segments=True)
    commits = read_spec(path).num_commits
    for lost in ([0], [commits - 1], [1, 2], [0, 2, commits - 1], list(range(commits))):
        for shard in lost:
            (path / f"top/c/{shard}/0/0").unlink()
            (path / f"samples/part-{shard:06d}.parquet").write_bytes(b"cut")
        assert make(path, MOST, size)[1].encoded == [], "a finished store is left as it is"
        unfinished(path)
        with StoreWriter(path, read_spec(path)) as writer:
            assert writer.missing_shards() == lost
        _, spans = make(path, MOST, size, hands=Eager())
        assert tree(path, segments=True) == expected
        assert spans.encoded[-1] == (-1, -1), "what is committed was encoded again"
        if len(lost) == 1:
            assert len(spans.encoded) <= 5


def test_damage_in_the_last_zarr_shard_is_mended_before_it_is_opened_again(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, 8)
    file = path / "bottom/c/1/0/0"
    file.write_bytes(file.read_bytes()[::-1])
    make(path, MORE, 8)
    assert tree(path) == tree(make(tmp_path / "whole.zarr", MORE, 8)[0])


def test_what_comes_out_differently_is_not_put_back(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, 8)
    unfinished(path)
    (path / "top/c/0/0/0").unlink()
    before = tree(path, segments=True)
    for other, message in (
        (
            [[(7, 2), (4, 0)], [(0, 2)]],
            r"Zarr shard 0 \(8 rows from row 0\).*came out differently \(quarantine/part-000000",
        ),
        ([[], []], "no longer gives the rows of Zarr shards"),
    ):
        with StoreWriter(path, read_spec(path)) as writer, pytest.raises(CodesError, match=message):
            mend(writer, writer.missing_shards(), Corpora(other).between, Eager())
        assert tree(path, segments=True) == before


def test_a_committed_zarr_shard_is_read_back_or_refused(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, 8)
    spec, record = read_spec(path), Commit.read(path, "commits/shard-000001.json")
    codes, samples, quarantine = read_shard(path, spec, record)
    np.testing.assert_array_equal(codes["bottom"], vqmill.open_codes(path)["bottom"][8:])
    assert codes["bottom"].dtype == np.uint8
    assert samples["key"].to_pylist() == ["0-1-1", "0-1-2", "0-1-3"]
    assert quarantine.num_rows == 2
    (path / "top/c/1/0/0").write_bytes(b"x")
    with pytest.raises(CodesError, match=r"top/c/1/0/0: not what was committed\. See: vqmill verify"):
        read_shard(path, spec, record)


def test_a_record_that_the_group_does_not_count_yet_is_believed_only_where_a_kill_can_leave_one(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, 8)
    spec = replace(read_spec(path), num_rows=10)
    (path / "zarr.json").write_bytes(group_metadata(spec))
    with pytest.raises(CodesError, match="counts 10 rows, the commit records 11"):
        StoreWriter(path, spec)


def test_the_first_zarr_shard_chooses_the_codec_for_all(tmp_path: Path) -> None:
    whole: dict[bool, dict[str, bytes]] = {}
    for hands in (Inline(), Eager()):
        path, _ = make(tmp_path / f"{len(whole)}.zarr", MORE, 8, None, hands)
        whole[isinstance(hands, Eager)] = tree(path, segments=True)
    assert whole[False] == whole[True]
    codes = vqmill.open_codes(path)
    chosen = smallest_codec(codes.spec, {name: codes[name][:8] for name in codes.levels})
    assert codes.spec.codec == chosen
    for codec in CODECS:
        named, _ = make(tmp_path / f"{codec}.zarr", MORE, 8, codec)
        assert read_spec(named).codec == codec
        assert (tree(named, segments=True) == whole[True]) == (codec == chosen)


def test_a_store_keeps_its_codec(tmp_path: Path) -> None:
    spec = spec_of(SEAM, 8)
    with StoreWriter(tmp_path / "a.zarr", spec) as writer:
        assert writer.spec.codec == "zstd"
    with StoreWriter(tmp_path / "a.zarr", replace(spec, codec=None)) as writer:
        assert writer.spec.codec == "zstd"
    with pytest.raises(UsageError, match='codec: there "zstd", now "blosc-lz4"'):
        StoreWriter(tmp_path / "a.zarr", replace(spec, codec="blosc-lz4"))
    with StoreWriter(tmp_path / "b.zarr", replace(spec, codec=None)) as writer:
        assert writer.spec.codec is None
    with StoreWriter(tmp_path / "b.zarr", spec) as writer:
        assert writer.spec.codec == "zstd", "nothing was written yet"


def test_choosing_is_killed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(make(tmp_path / "whole.zarr", SEAM, 4, None)[0], segments=True)
    for after in range(24):
        path = tmp_path / str(after) / "codes.zarr"
        with monkeypatch.context() as patch:
            kill(patch, after)
            with pytest.raises(Killed):
                make(path, SEAM, 4, None)
        make(path, SEAM, 4, None)
        assert tree(path, segments=True) == whole, f"killed after {after} writes"


def test_counts_are_those_of_the_records(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "codes.zarr", SEAM, 8)
    make(path, MORE, 8)
    with StoreWriter(path, read_spec(path)) as writer:
        assert writer.counts == Counts(22, 6)
        assert [commit.cursor for commit in writer.commits][-1] == Cursor(5)
