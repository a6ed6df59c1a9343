"""Tars packed with gzip: read when asked for, the same samples as of plain ones, and no damage or bomb passes for the end of a tar."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from pipelines import encoder as encoder_module
from pipelines.corpus import (
    CorpusError,
    Plan,
    Preprocessing,
    Reason,
    SampleRef,
    list_samples,
    load_sample,
    plan_corpus,
    read_samples,
    stream,
)
from pipelines.corpus.grouping import Tally, TarSample, walk_samples
from pipelines.corpus.gunzip import MOST_RATIO, PIECE_BYTES, SLACK_BYTES, gunzip
from pipelines.corpus.holdout import choose_holdout
from pipelines.corpus.tar import TarDamage
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed


def pack(folder: Path, suffix: str = ".tar.gz", pieces: int = 1) -> Path:
    """The tars of a folder, each packed as so many gzip members, in a folder of their own."""
    packed_folder = folder.with_name(folder.name + suffix)
    packed_folder.mkdir()
    for path in folder.glob("*.tar"):
        data = path.read_bytes()
        size = -(-len(data) // pieces)
        members = [gzip.compress(data[start : start + size]) for start in range(0, len(data), size)]
        (packed_folder / (path.stem + suffix)).write_bytes(b"".join(members) + bytes(700))
    return packed_folder


def facts(plan: Plan) -> list[Any]:
    """All of a corpus but the names of its files: the samples as they are read, and as they are listed and loaded."""
    read = [sample for shard in plan.shards for sample in read_samples(shard)]
    assert [load_sample(shard, ref) for shard in plan.shards for ref in list_samples(shard)] == read
    assert [load_sample(shard, ref.without_data()) for shard in plan.shards for ref in list_samples(shard)] == read
    return [(s.key, s.source.split(".")[0], s.index, s.image, s.label, s.caption, s.json, s.problem) for s in read]


@pytest.mark.parametrize(("suffix", "pieces"), [(".tar.gz", 1), (".TGZ", 4)])
def test_samples_are_those_of_the_plain_tars(shards: Path, suffix: str, pieces: int) -> None:
    plain, other = plan_corpus(str(shards)), pack(shards, suffix, pieces)
    for named in ("", f"/{{000000..000002}}{suffix}", f"/*{suffix}"):
        plan = plan_corpus(f"{other}{named}", gzip_tars=True)
        assert [shard.name for shard in plan.shards] == [f"00000{number}{suffix}" for number in range(3)]
        assert facts(plan) == facts(plain)
        assert plan.digest != plain.digest
    cut = plan.cut_at([5, 17])
    assert [row[0] for row in facts(cut)] == [f"sample/{number:04d}" for number in range(30)]
    assert [sample.key for sample in read_samples(cut.shards[1], start=3)] == ["sample/0008", "sample/0009"]


def test_a_bucket_has_them_too(shards: Path, s3: Any, address: str) -> None:
    s3.upload(pack(shards), address)
    assert facts(plan_corpus(address, gzip_tars=True)) == facts(plan_corpus(str(shards)))
    one = plan_corpus(f"{address}/000001.tar.gz", gzip_tars=True)
    assert [shard.name for shard in one.shards] == ["000001.tar.gz"]
    for unasked in (f"{address}/000001.tar.gz", address):
        with pytest.raises(CorpusError, match="--gzip-tars"):
            plan_corpus(unasked)


def test_unasked_they_are_passed_over_and_the_flag_is_named(shards: Path) -> None:
    other = pack(shards)
    (other / "more.tgz").write_bytes((other / "000000.tar.gz").read_bytes())
    (other / "other.tar.xz").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"3 x packed tar: \.tar\.gz.* With --gzip-tars tars packed with gzip are"):
        plan_corpus(str(other))
    with pytest.raises(CorpusError, match=r"000000\.tar\.gz is packed with gzip; with --gzip-tars such tars are read"):
        plan_corpus(f"{other}/000000.tar.gz")
    with pytest.raises(CorpusError, match=r"other\.tar\.xz is not a \.tar"):
        plan_corpus(f"{other}/other.tar.xz", gzip_tars=True)
    (other / "a.tar").write_bytes((shards / "000000.tar").read_bytes())
    skipped = {"packed tar: .tar.gz": 3, "packed tar: .tgz": 1, "packed tar: .tar.xz": 1}
    assert (plan_corpus(str(other)).skipped, plan_corpus(str(other)).num_samples) == (skipped, 10)
    assert plan_corpus(str(other), gzip_tars=True).skipped == {"packed tar: .tar.xz": 1}
    assert plan_corpus(str(other), gzip_tars=True).num_samples == 50


def test_beside_images_they_are_passed_over(shards: Path, make_picture: Callable[..., bytes]) -> None:
    other = pack(shards)
    (other / "a.png").write_bytes(make_picture(0))
    (other / "a.tar").touch()
    for asked in (False, True):
        assert plan_corpus(str(other), gzip_tars=asked).skipped == {"packed tar: .tar.gz": 3, "tar: .tar": 1}


def test_they_are_encoded_as_plain_ones_from_any_span_on(
    scenes: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(encoder_module, "SPAN_SAMPLES", 32)
    encoder = SpanEncoder(packed(tokenizer.load(tokenizer_folder)), Preprocessing(16), Encoding(), "cpu")
    (plain,) = plan_corpus(scenes.replace("{000000..000002}", "000001")).shards
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(Path(scenes.replace("{000000..000002}", "000001")).read_bytes()))
    (shard,) = plan_corpus(str(tmp_path / "a.tar.gz"), gzip_tars=True).shards
    expected = list(encoder.spans(plain))
    for most in (encoder_module.MAX_HELD_BYTES, 1000):  # which a few images pass
        monkeypatch.setattr(encoder_module, "MAX_HELD_BYTES", most)
        for first in (0, 2):
            for mine, theirs in zip(encoder.spans(shard, first), expected[first:], strict=True):
                assert mine.samples.drop(["source"]) == theirs.samples.drop(["source"])
                assert mine.index == theirs.index
                assert all((mine.codes[level] == codes).all() for level, codes in theirs.codes.items())


def test_no_more_is_held_than_may_wait_to_be_decoded(
    scenes: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding takes its time; what was read and is not decoded yet is counted whenever a sample is read."""
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(encoder_module, "MAX_HELD_BYTES", 5000)
    held, most, load = 0, 0, SpanEncoder._load

    def listed(*arguments: Any, **options: Any) -> Any:
        nonlocal held, most
        for ref in list_samples(*arguments, **options):
            held += ref.held_bytes
            most = max(most, held)
            yield ref

    def slow(encoder: SpanEncoder, shard: Any, ref: SampleRef) -> Any:
        nonlocal held
        time.sleep(0.002)
        held -= ref.held_bytes
        return load(encoder, shard, ref)

    monkeypatch.setattr(encoder_module, "list_samples", listed)
    monkeypatch.setattr(SpanEncoder, "_load", slow)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(Path(scenes.replace("{000000..000002}", "000001")).read_bytes()))
    (shard,) = plan_corpus(str(tmp_path / "a.tar.gz"), gzip_tars=True).shards
    encoder = SpanEncoder(packed(tokenizer.load(tokenizer_folder)), Preprocessing(16), Encoding(), "cpu", 1)
    assert sum(span.samples.num_rows for span in encoder.spans(shard)) == 100
    assert 5000 < most < 8000, "one image more than is allowed at most"


def test_training_takes_them_in_the_order_of_plain_ones(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = plan_corpus(str(shards)), plan_corpus(str(pack(shards)), gzip_tars=True)
    assert choose_holdout(other, Preprocessing(8), 0.1) == choose_holdout(plain, Preprocessing(8), 0.1)

    def batches(plan: Plan) -> list[torch.Tensor]:
        reader = stream.TrainingStream(
            plan, Preprocessing(8), stream.Augmentation(), batch_size=4, seed=1, holdout_fraction=0.1, shuffle_buffer=13
        )
        found = [next(reader)["images"] for _ in range(15)]
        reader.close()
        return found

    for mine, theirs in zip(batches(other), batches(plain), strict=True):
        assert torch.equal(mine, theirs)
    monkeypatch.setattr(stream, "MAX_HELD_BYTES", 10_000)
    batches(plain)
    with pytest.raises(CorpusError, match=r"samples of tars that are packed with gzip take .* Unpack the tars"):
        batches(other)


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


RANDOM = np.random.default_rng(0)
# Two thirds of it pack well, the rest does not at all, and it takes several pieces.
CONTENTS = [number.to_bytes(2, "big") * 1000 if number % 3 else RANDOM.bytes(2000) for number in range(90)]
MEMBERS = {
    f"{number // 2:03d}.{('cls', 'jpg')[number % 2]}": bytes(data[: 2000 if number % 2 else 3])
    for number, data in enumerate(CONTENTS)
}
TAR = tar_of(MEMBERS)
GZIPPED = [
    gzip.compress(TAR[:30_000], 1, mtime=0),
    gzip.compress(TAR[30_000:60_000], 0, mtime=0),
    gzip.compress(TAR[60_000:], mtime=0),
]
PACKED = b"".join(GZIPPED)


def walk(data: bytes) -> list[TarSample]:
    """All rows; how many there are, and what is wrong with them, is the same whether data is read or passed over."""
    rows = list(walk_samples(gunzip(io.BytesIO(data)), Tally()))
    passed = list(walk_samples(gunzip(io.BytesIO(data)), Tally(), load=False))
    assert [(row.key, row.index, row.problem) for row in passed] == [(row.key, row.index, row.problem) for row in rows]
    return rows


WHOLE = walk(PACKED)
ENDS = [max(part.offset + part.size for part in row.parts) for row in WHOLE]


def until_error(data: bytes) -> int:
    """How much unpacks of damaged data, byte by byte, as Python's own module says."""
    unpacked, inflater = 0, zlib.decompressobj(31)
    for place in range(len(data)):
        try:
            unpacked += len(inflater.decompress(data[place : place + 1]))
        except zlib.error:
            break
        if inflater.eof:
            inflater = zlib.decompressobj(31)
    return unpacked


def require_all_before(rows: list[TarSample], there: int) -> None:
    """Every sample that lies whole in the first so many bytes of the tar is there as it was, but for the last one: what else
    belonged to it may be lost."""
    certain = max(sum(end <= there for end in ENDS) - 1, 0)
    assert rows[:certain] == WHOLE[:certain]
    assert [row.index for row in rows] == list(range(len(rows)))


def test_several_members_are_one_tar() -> None:
    assert len(PACKED) > 2 * PIECE_BYTES
    assert list(walk_samples(io.BytesIO(TAR), Tally())) == WHOLE
    assert all(row.problem is None for row in WHOLE)


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=2000, max_examples=150)
def test_cut_anywhere_what_came_whole_is_kept_and_the_rest_has_a_row(share: float) -> None:
    length = int(share * len(PACKED))
    rows = walk(PACKED[:length])
    require_all_before(rows, until_error(PACKED[:length]))
    assert rows[-1].problem is not None, "a cut between gzip members, too, is seen by the tar's missing end"
    assert rows[-1].problem.reason is Reason.TRUNCATED


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(deadline=2000, max_examples=150)
def test_flipped_anywhere_it_is_a_row_and_what_came_before_is_kept(share: float, change: int) -> None:
    data = bytearray(PACKED)
    place = int(share * len(data))
    data[place] ^= change
    rows = walk(bytes(data))
    require_all_before(rows, until_error(PACKED[:place]))
    assert rows == WHOLE or rows[-1].problem is not None, "its checksum at least shows it, where it changes anything"


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", Reason.TRUNCATED, "byte 0: the gzip stream ends too early, at byte 0 of the file"),
        (TAR, Reason.DAMAGED_TAR, r"byte 0: the gzip stream is damaged at byte 1 of the file \(incorrect header check\)"),
        (gzip.compress(b""), Reason.TRUNCATED, "byte 0: the file is empty"),
        (PACKED[:-1], Reason.TRUNCATED, f"byte {len(TAR)}: the gzip stream ends too early, at byte {len(PACKED) - 1}"),
        (PACKED[:-8] + bytes(8), Reason.DAMAGED_TAR, f"byte {len(TAR)}: .* at byte {len(PACKED) - 5} .*incorrect data check"),
        (PACKED[:-4] + bytes(4), Reason.DAMAGED_TAR, f"byte {len(TAR)}: .* at byte {len(PACKED) - 1} .*incorrect length"),
        (PACKED + b"garbage", Reason.DAMAGED_TAR, f"byte {len(TAR)}: .* at byte {len(PACKED) + 1} .*incorrect header"),
        (PACKED + bytes(9) + b"garbage", Reason.DAMAGED_TAR, f"at byte {len(PACKED) + 10} .*incorrect header"),
    ],
    ids=["nothing", "not packed", "nothing in it", "cut", "checksum", "length", "garbage", "garbage behind zeros"],
)  # fmt: skip
def test_damage_is_named_with_its_place(data: bytes, reason: Reason, detail: str) -> None:
    rows = walk(data)
    assert rows[-1].problem is not None
    assert rows[-1].problem.reason is reason
    assert (len(rows), rows[:-1]) in ((1, []), (len(WHOLE) + 1, WHOLE))
    assert re.search(detail, rows[-1].problem.detail), rows[-1].problem.detail


def test_what_unpacks_to_too_much_ends_soon_with_a_row() -> None:
    claimed = tarfile.TarInfo("bomb.jpg")
    claimed.size = 1 << 40
    for data in (gzip.compress(bytes(120 << 20), 1), gzip.compress(bytes(1 << 20)) * 120):
        start = time.perf_counter()
        rows = walk(gzip.compress(TAR[: ENDS[9]] + bytes(-ENDS[9] % 512) + claimed.tobuf()) + data)
        assert time.perf_counter() - start < 5
        assert rows[:10] == WHOLE[:10]
        assert [(row.key, row.problem and row.problem.reason) for row in rows[10:]] == [("bomb", Reason.TOO_MANY_BYTES)]
    plain = bytes(SLACK_BYTES)
    assert gunzip(io.BytesIO(gzip.compress(plain))).read() == plain, "so much is always allowed"


def test_what_packs_well_all_along_may_be_as_large_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpus.gunzip.SLACK_BYTES", 1 << 16)
    data = b"".join(RANDOM.bytes(30) + bytes(330) for _ in range(10_000))
    unpacked = gunzip(io.BytesIO(gzip.compress(data)))
    assert unpacked.read() == data
    assert len(data) > 5 * len(gzip.compress(data)) + (1 << 16)
    monkeypatch.setattr("pipelines.corpus.gunzip.MOST_RATIO", MOST_RATIO // 4)
    with pytest.raises(TarDamage, match="unpacks to more than 5 times"):
        gunzip(io.BytesIO(gzip.compress(data))).read()
