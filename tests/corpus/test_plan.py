"""What a corpus string means, what its digest depends on, and that every sample is a row."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import webdataset

from pipelines.corpus import CorpusError, Plan, RawSample, Reason, list_samples, load_sample, plan_corpus, read_samples
from pipelines.planning import planned
from vqmill.errors import CodesError


def read_all(plan: Plan) -> list[RawSample]:
    """Reads in both ways there are, and sees that they agree."""
    samples = []
    for shard in plan.shards:
        rows = list(read_samples(shard))
        loaded = [load_sample(shard, ref) for ref in list_samples(shard)]
        assert [(r.key, r.source, r.index, r.label, r.caption, r.json, r.problem) for r in rows] == [
            (r.key, r.source, r.index, r.label, r.caption, r.json, r.problem) for r in loaded
        ]
        assert all(
            np.array_equal(a.image, b.image)
            for a, b in zip(rows, loaded, strict=True)
            if isinstance(a.image, np.ndarray)
        )
        assert all(a.image == b.image for a, b in zip(rows, loaded, strict=True) if isinstance(a.image, bytes))
        assert [row.index for row in rows] == list(range(shard.num_samples))
        for start in (1, shard.num_samples - 1, shard.num_samples):
            assert [row.key for row in read_samples(shard, start)] == [row.key for row in rows[start:]]
        samples += rows
    assert len(samples) == plan.num_samples
    return samples


def test_folder_with_classes(folder: Path) -> None:
    plan = plan_corpus(str(folder))
    assert plan.class_names == ("cat", "dog")
    assert dict(plan.skipped) == {"not an image: .txt": 1, "video: .mp4": 1}
    samples = read_all(plan)
    assert [s.key for s in samples[:3]] == ["cat/00", "cat/02", "cat/04"]
    assert [s.source for s in samples[:1]] == ["cat/00.png"]
    assert [s.label for s in samples] == [0] * 12 + [1] * 12
    assert samples[0].image == (folder / "cat/00.png").read_bytes()


def test_an_image_outside_the_class_folders_means_no_classes(folder: Path, make_picture: Callable[..., bytes]) -> None:
    (folder / "loose.jpg").write_bytes(make_picture(0))
    plan = plan_corpus(str(folder))
    assert plan.class_names == ()
    assert {s.label for s in read_all(plan)} == {None}


def test_keys_are_unique(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.png.jpg", "b.jpg", "é.jpg"):
        (tmp_path / name).write_bytes(b"x")
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.jpg"), "wb") as file:
        file.write(b"x")
    keys = [s.key for s in read_all(plan_corpus(str(tmp_path)))]
    assert keys == ["a.jpg", "a.png", "a.png.jpg", "b", "é", "\\xff"]


def test_order_is_by_bytes_of_the_whole_path(tmp_path: Path) -> None:
    for name in ("a/z.png", "a-b/z.png", "a.png", "B.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [s.source for s in read_all(plan_corpus(str(tmp_path)))] == ["B.png", "a-b/z.png", "a.png", "a/z.png"]


def test_files_are_bundled(tmp_path: Path) -> None:
    for index in range(300):
        (tmp_path / f"{index}.gif").write_bytes(b"GIF89a")
    plan = plan_corpus(str(tmp_path))
    assert [shard.num_samples for shard in plan.shards] == [256, 44]
    assert len({s.key for s in read_all(plan)}) == 300


def test_links_are_followed_but_not_in_circles(folder: Path) -> None:
    (folder / "cat" / "back").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nothing")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "more").symlink_to(folder / "dog")
    plan = plan_corpus(str(folder))
    assert plan.num_samples == 36
    assert plan.skipped["link: back into its own folder"] == 1
    assert plan.skipped["link: to nothing"] == 2


@pytest.mark.parametrize(
    "form", ["{root}/{{000000..000002}}.tar", "{root}/*.tar", "{root}", "{root}/00000{{0,1,2}}.tar"]
)
def test_tars_by_braces_globs_and_folder(shards: Path, form: str) -> None:
    plan = plan_corpus(form.format(root=shards))
    assert [shard.name for shard in plan.shards] == ["000000.tar", "000001.tar", "000002.tar"]
    samples = read_all(plan)
    assert [s.key for s in samples] == [f"sample/{n:04d}" for n in range(30)]
    assert [s.label for s in samples] == [n % 5 for n in range(30)]
    assert samples[29].caption == "picture 29 in grün"
    assert samples[29].source == "000002.tar"
    assert plan.digest == plan_corpus(str(shards)).digest


def test_one_tar_and_tars_in_several_folders(shards: Path) -> None:
    assert plan_corpus(str(shards / "000001.tar")).num_samples == 10
    shutil.copytree(shards, shards.parent / "more")
    plan = plan_corpus(f"{shards.parent}/{{tars,more}}/00000{{0..2}}.tar")
    assert [shard.name for shard in plan.shards][::3] == ["tars/000000.tar", "more/000000.tar"]


def test_digest_is_of_the_content_not_of_the_place(folder: Path, shards: Path, tmp_path: Path) -> None:
    for corpus in (folder, shards):
        digest = plan_corpus(str(corpus)).digest
        moved = tmp_path / "elsewhere" / corpus.name
        shutil.copytree(corpus, moved)
        assert plan_corpus(str(moved)).digest == digest
        target = next(
            path for path in sorted(moved.rglob("*")) if path.suffix in (".png", ".tar") and path.name[0] != "."
        )
        target.write_bytes(target.read_bytes() + bytes(512))
        assert plan_corpus(str(moved)).digest != digest


def test_labels_captions_and_json_that_cannot_be_read(tmp_path: Path) -> None:
    import webdataset

    cases: list[tuple[dict[str, bytes], object, object]] = [
        ({"cls": b" 12\n"}, 12, None),
        ({"cls": b"-1"}, None, None),
        ({"cls": b"cat"}, None, Reason.BAD_LABEL),
        ({"cls": b""}, None, Reason.BAD_LABEL),
        ({"cls": b"1_0"}, None, Reason.BAD_LABEL),
        ({"cls": b"-2"}, None, Reason.BAD_LABEL),
        ({"cls": str(2**63).encode()}, None, Reason.BAD_LABEL),
        ({"cls": str(2**63 - 1).encode()}, 2**63 - 1, None),
        ({"cls": b"1" * 100}, None, Reason.BAD_LABEL),
        ({"json": b'{"label": 4}'}, 4, None),
        ({"json": b'{"label": true}'}, None, None),
        ({"json": b'{"label": 4.0}'}, None, None),
        ({"json": b'{"label": 4}', "cls": b"5"}, 5, None),
        ({"json": b"[1]"}, None, None),
        ({"json": b'{"label": '}, None, Reason.BAD_TEXT),
        ({"json": b"[" * 100_000}, None, Reason.BAD_TEXT),
        ({"json": b"1" * 5000}, None, Reason.BAD_TEXT),
        ({"txt": b"\xff"}, None, Reason.BAD_TEXT),
    ]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for index, (members, _, _) in enumerate(cases):
            writer.write({"__key__": f"{index}", "jpg": b"x", **members})
    samples = read_all(plan_corpus(str(tmp_path / "a.tar")))
    for sample, (members, label, reason) in zip(samples, cases, strict=True):
        assert (sample.label, sample.problem and sample.problem.reason) == (label, reason), members


def test_what_changes_after_planning_is_a_row(folder: Path, shards: Path) -> None:
    plan = plan_corpus(str(folder))
    (folder / "cat/00.png").unlink()
    (folder / "cat/02.png").write_bytes(b"shorter")
    (folder / "cat/04.png").unlink()
    os.mkfifo(folder / "cat/04.png")
    rows = read_all(plan)
    assert [row.problem and row.problem.reason for row in rows[:4]] == [Reason.UNREADABLE] * 3 + [None]
    plan = plan_corpus(str(shards))
    (shards / "000000.tar").unlink()
    (shards / "000001.tar").write_bytes(bytes(10240))
    rows = [row for shard in plan.shards for row in read_samples(shard)]
    assert [row.problem and row.problem.reason for row in rows] == [Reason.UNREADABLE] * 20 + [None] * 10
    listed = [ref for shard in plan.shards for ref in list_samples(shard)]
    assert [(ref.key, ref.problem) for ref in listed] == [(row.key, row.problem) for row in rows]


def test_the_index_of_a_tar_holds_its_short_texts_and_no_image(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard, *_) = plan_corpus(str(shards)).shards
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, place: read.append(size) or pread(file, size, place))
    for ref, whole in zip(list_samples(shard), read_samples(shard), strict=True):
        assert load_sample(shard, ref) == whole
        assert isinstance(whole.image, bytes)
        assert read.pop() == len(whole.image)
        assert not read, "nothing but the image"
        assert (ref.held_bytes, ref.without_data()) == (0, ref)


def test_a_tar_exchanged_while_it_is_opened_is_a_row(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard, *_) = plan_corpus(str(shards)).shards
    ref = next(list_samples(shard))
    other = os.stat(shutil.copy(shards / "000000.tar", shards / "copy"))
    monkeypatch.setattr(os, "stat", lambda path: other)
    problem = load_sample(shard, ref).problem
    monkeypatch.undo()
    assert problem is not None
    assert (problem.reason, problem.detail) == (Reason.UNREADABLE, "the tar has changed since the corpus was planned")
    assert load_sample(shard, ref).problem is None


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("{tmp}/nothing", "no such file or folder"),
        ("{tmp}/{{0..3}}.tar", "4 of 4 files are missing"),
        ("{tmp}/y*.tar", "nothing matches"),
        ("{tmp}/{{0.tar", "never closed"),
        ("{tmp}/empty", "no sample in it"),
        ("{tmp}/tok", "tok: not a corpus: it holds a tokenizer. A corpus is a folder of images"),
        ("{tmp}/text", r"passed over: 1 x not an image: \.txt, 1 x packed tar: \.tar\.gz"),
        ("{tmp}/text/a.txt", "not a .tar"),
        ("{tmp}/{{empty,text}}", "is a folder"),
        ("{tmp}/{{z,z}}.tar", "more than once"),
        ("file:///bucket/x.tar", "named by their path, without file://"),
        ("ftp://bucket/x.tar", "not an address that can be read"),
        ("torchvision:FashionMNIS?root=x", "MNIST, FashionMNIST"),
        ("torchvision:CIFAR10?root=x", "tar shards"),
        ("torchvision:MNIST", "root= is missing"),
        ("torchvision:MNIST?rot=x", "Did you mean 'root'?"),
        ("torchvision:MNIST?root=x&split=val", "train, test, all"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, corpus: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    (tmp_path / "text" / "b.tar.gz").touch()
    (tmp_path / "z.tar").write_bytes(bytes(10240))
    (tmp_path / "tok").mkdir()
    for name in ("tokenizer.safetensors", "reconstructions.png"):
        (tmp_path / "tok" / name).touch()
    with pytest.raises(CorpusError, match=message):
        plan_corpus(corpus.format(tmp=tmp_path))
    assert issubclass(CorpusError, CodesError)


def write_idx(path: Path, array: np.ndarray) -> str:
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small dataset in MNIST's layout, with a stand-in for torchvision's table."""
    raw = tmp_path / "root & co" / "MNIST" / "raw"
    random = np.random.default_rng(0)
    resources = []
    for split, count in (("train", 1500), ("t10k", 10)):
        for name, array in (
            (f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 6, 5), dtype=np.uint8)),
            (f"{split}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8)),
        ):
            resources.append((name, write_idx(raw / name, array)))
    module = ModuleType("torchvision")
    module.datasets = SimpleNamespace(MNIST=SimpleNamespace(resources=resources, classes=[str(n) for n in range(10)]))
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return raw


def idx_corpus(raw: Path, split: str = "all") -> str:
    return f"torchvision:MNIST?root={str(raw.parents[1]).replace('&', '%26')}&split={split}"


def test_idx(idx: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in idx.parents[1].rglob("*")}
    plan = plan_corpus(idx_corpus(idx))
    assert [shard.name for shard in plan.shards] == ["train[0:1024]", "train[1024:1500]", "test[0:10]"]
    samples = read_all(plan)
    assert [samples[n].key for n in (0, 1499, 1500)] == ["train-00000000", "train-00001499", "test-00000000"]
    assert [s.label for s in samples[1500:]] == list(range(10))
    assert isinstance(samples[0].image, np.ndarray)
    assert samples[0].image.shape == (6, 5)
    assert not np.array_equal(samples[0].image, samples[1].image)
    assert before == {path: path.stat().st_mtime_ns for path in idx.parents[1].rglob("*")}
    assert plan_corpus(idx_corpus(idx, "train")).num_samples == 1500
    assert plan_corpus(idx_corpus(idx, "test")).num_samples == 10
    digest = plan.digest
    for path in list(idx.glob("*.gz")):  # unpacked files are read as well
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert plan_corpus(idx_corpus(idx)).digest == digest


def test_idx_that_is_not_the_published_one(idx: Path) -> None:
    packed = idx / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(CorpusError, match="MD5"):
        plan_corpus(idx_corpus(idx))
    packed.unlink()
    with pytest.raises(CorpusError, match="neither"):
        plan_corpus(idx_corpus(idx))
    packed.with_suffix("").write_bytes(b"\0\0\x0b\3" + bytes(12))
    with pytest.raises(CorpusError, match="expected an idx file of bytes"):
        plan_corpus(idx_corpus(idx))
    packed.with_suffix("").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 1500, 6, 5) + bytes(7))
    plan = plan_corpus(idx_corpus(idx, "train"))
    rows = [row for shard in plan.shards for row in read_samples(shard)]
    assert len(rows) == 1500
    assert {row.problem and row.problem.reason for row in rows} == {Reason.UNREADABLE}


def test_a_corpus_that_has_grown_is_cut_like_the_one_before(tmp_path: Path, idx: Path) -> None:
    for index in range(300):
        (tmp_path / f"{index:04d}.gif").write_bytes(b"GIF89a")
    old = plan_corpus(str(tmp_path))
    for index in range(300, 700):
        (tmp_path / f"{index:04d}.gif").write_bytes(b"GIF89a")
    plan = plan_corpus(str(tmp_path))
    assert plan.cut_at([700, 9999, 0]).digest == plan.cut_at([]).digest == plan.digest == plan.digest_of_first(3)
    assert plan.digest_of_first(2) != old.digest
    cut = plan.cut_at([300])
    assert [(shard.name, shard.num_samples) for shard in cut.shards] == [
        ("files-000000", 256), ("files-000001", 44), ("files-000002", 212), ("files-000003", 188),
    ]  # fmt: skip
    assert cut.digest_of_first(2) == cut.first(2).digest == old.digest
    assert [shard.index for shard in cut.shards] == [0, 1, 2, 3]
    assert [sample.key for sample in read_all(cut)] == [sample.key for sample in read_all(plan)]
    assert cut.cut_at([300, 600, 601]).cut_at([300, 600, 601]).digest == plan.cut_at([300, 600, 601]).digest
    assert cut.num_bytes == plan.num_bytes

    ranges = plan_corpus(idx_corpus(idx)).cut_at([100, 1024, 1500, 1505])
    assert [shard.name for shard in ranges.shards] == [
        "train[0:100]", "train[100:1024]", "train[1024:1500]", "test[0:5]", "test[5:10]",
    ]  # fmt: skip
    assert [s.key for s in read_all(ranges)] == [s.key for s in read_all(plan_corpus(idx_corpus(idx)))]
    assert ranges.digest_of_first(3) == plan_corpus(idx_corpus(idx, "train")).cut_at([100]).digest


def test_tars_are_cut_too(shards: Path) -> None:
    plan = plan_corpus(str(shards))
    cut = plan.cut_at([5, 10, 17])
    assert [(shard.name, shard.num_samples) for shard in cut.shards] == [
        ("000000.tar[0:5]", 5), ("000000.tar[5:10]", 5), ("000001.tar[0:7]", 7), ("000001.tar[7:10]", 3), ("000002.tar", 10),
    ]  # fmt: skip
    assert [shard.index for shard in cut.shards] == [0, 1, 2, 3, 4]
    assert cut.num_bytes == plan.num_bytes
    assert plan.cut_at([10]) == plan
    assert cut.digest == plan.cut_at([5]).cut_at([5, 10, 17]).digest
    whole, parts = read_all(plan), read_all(cut)
    assert [(row.key, row.source, row.image, row.label) for row in parts] == [
        (row.key, row.source, row.image, row.label) for row in whole
    ]
    assert [row.index for row in parts] == [*range(5), *range(5), *range(7), *range(3), *range(10)]
    part = cut.shards[1]
    assert [row.key for row in read_samples(part, start=2)] == [row.key for row in whole[7:10]]
    assert [load_sample(part, ref).image for ref in list_samples(part)] == [row.image for row in whole[5:10]]
    (shards / "000000.tar").write_bytes(bytes(10240))
    gone = list(read_samples(part))
    assert [(row.key, row.source, row.index) for row in gone][:2] == [("#5", "000000.tar", 0), ("#6", "000000.tar", 1)]
    assert {row.problem and row.problem.reason for row in gone} == {Reason.UNREADABLE}


def test_the_first_samples_are_the_beginning_of_any_longer_plan(shards: Path, idx: Path) -> None:
    for corpus in (str(shards), idx_corpus(idx)):
        plan = plan_corpus(corpus)
        keys = [row.key for row in read_all(plan)]
        for number in (1, 7, 10, 25):
            first = plan.first_samples(number)
            assert (first.num_samples, [row.key for row in read_all(first)]) == (number, keys[:number])
            assert first.corpus == f"{corpus} (its first {number} samples)"
            assert plan.cut_at([number]).digest_of_first(len(first.shards)) == first.digest
            assert plan.first_samples(number + 2).cut_at([number]).digest_of_first(len(first.shards)) == first.digest
        assert plan.first_samples(plan.num_samples) is plan


def test_what_somebody_may_have_meant_to_be_read_is_said(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_picture: Callable[..., bytes]
) -> None:
    planned(str(folder))
    planned(str(shards))
    assert capsys.readouterr().err == ""
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    planned(str(folder))
    assert (
        f"holds images and 3 tars, and of these the images are read only. For the tars, name them: '{folder}/*.tar'"
        in " ".join(capsys.readouterr().err.split())
    )
    with webdataset.TarWriter(str(tmp_path / "pairs.tar")) as writer:
        for number in range(2):
            writer.write({"__key__": f"{number}", "jpg": make_picture(number), "png": make_picture(number)})
    planned(str(tmp_path / "pairs.tar"))
    assert "2 images are not used, each a further one of its sample" in capsys.readouterr().err
