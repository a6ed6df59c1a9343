"""Samples that were set aside and are tried again: each is in the store once, whatever happens in between."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vqmill
from pipelines import tokenize as tokenize_module
from pipelines.assembly import ArrivedSpan, Order, SpanFacts, carry_out, extend, mend
from pipelines.cli import app
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.encoder import SpanEncoder
from pipelines.foreign import packed
from pipelines.tokenize import TokenizeOptions
from pipelines.watch import Worker
from vqmill.bucket import Bucket
from vqmill.commits import Cursor
from vqmill.layout import group_metadata, read_spec
from vqmill.repair import repair_store
from vqmill.verify import verify_store
from vqmill.writer import StoreWriter

BAD = [0, 3, 6, 9, 12, 15, 18, 19]  # of each tar's 20 samples


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(folder: Path, number: int, bad: Sequence[int]) -> None:
    """A tar of 20 samples, those in `bad` damaged; it has the same size whichever they are."""
    with tarfile.open(folder / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(20):
            data = png(20 * number + index)
            for extension, content in (
                ("png", b"\0" * len(data) if index in bad else data),
                ("cls", str(index % 4).encode()),
            ):
                member = tarfile.TarInfo(f"{number}-{index:02d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Here:
    """Writes in this process, at once."""

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        return carry_out(order, *payloads)

    def ready(self, handle: Any) -> bool:
        return True

    def collect(self, handle: Any) -> Any:
        return handle


def run_here(
    plan: Plan, model: Any, writer: StoreWriter, missing: list[int], options: TokenizeOptions, progress: Any, note: Any
) -> list[Worker]:
    """As the driver does, without its actors: most tests need no processes."""
    encoder = SpanEncoder(
        packed(model), Preprocessing(size=options.size, channels=model.channels), options.encoding, options.device
    )

    def between(start: Cursor, stop: Cursor) -> Iterator[ArrivedSpan]:
        for unit in range(start.input_shard, stop.input_shard + bool(stop.span or stop.row)):
            first = start.span if unit == start.input_shard else 0
            last = stop.span + bool(stop.row) if unit == stop.input_shard else None
            for span in encoder.spans(plan.shards[unit], first, last):
                yield ArrivedSpan(unit, SpanFacts(span.index, span.samples.num_rows, span.counts), span)

    mend(writer, missing, between, Here())
    extend(writer, between(writer.cursor, Cursor(len(plan.shards))), len(plan.shards), Here())
    return []


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(tokenize_module, "_run", run_here)
    monkeypatch.setattr(tokenize_module, "ray_cluster", lambda workers, device: nullcontext())


class Corpus:
    """Tars in a folder, and the store that is made of them in Zarr shards of 8 rows."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer, self.out = folder / "tars", tokenizer, folder / "codes.zarr"
        self.folder.mkdir()

    def write(self, *bad: Sequence[int]) -> None:
        for number, indices in enumerate(bad):
            write_tar(self.folder, number, indices)

    def words(self, *more: str | Path | int) -> list[str]:
        words = ("tokenize", self.folder, "--tokenizer", self.tokenizer, "--out", self.out, "--shard-rows", 8)
        return [str(word) for word in (*words, *more)]

    def run(self, *more: str | Path | int) -> int:
        return app(self.words(*more))

    def retry(self, *more: str | Path | int) -> int:
        return self.run("--retry-quarantined", *more)

    @property
    def codes(self) -> vqmill.Codes:
        return vqmill.open_codes(self.out)

    def rows(self) -> list[str]:
        return self.codes.samples()["key"].to_pylist()

    def bad(self) -> list[str]:
        return self.codes.quarantine()["key"].to_pylist()


@pytest.fixture
def corpus(tmp_path: Path, tokenizer_folder: Path, in_this_process: None) -> Corpus:
    """Two tars of 20 samples; 16 of the 40 are bad, so that the store has 24 rows in three full Zarr shards."""
    made = Corpus(tmp_path, tokenizer_folder)
    made.write(BAD, BAD)
    assert made.run() == 3
    return made


def keys(number: int, indices: Sequence[int]) -> list[str]:
    return [f"{number}-{index:02d}" for index in indices]


def good(number: int, bad: Sequence[int]) -> list[str]:
    return keys(number, [index for index in range(20) if index not in bad])


def tree(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def counted(report: Any) -> tuple[int, int, int]:
    return report["seen"], report["encoded"], report["quarantined"]


def require_same_codes(codes: vqmill.Codes, fresh: vqmill.Codes) -> None:
    """Both stores hold the same samples with the same codes and facts, in whichever order."""
    order, wanted = np.argsort(codes.sample_keys()), np.argsort(fresh.sample_keys())
    for level in codes.levels:
        assert np.array_equal(codes[level][:][order], fresh[level][:][wanted])
    assert codes.samples().take(order) == fresh.samples().take(wanted)


def test_samples_that_work_now_become_rows_behind_the_others(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = good(0, BAD) + good(1, BAD)
    first_reasons = corpus.codes.quarantine()
    corpus.write([3, 6, 19], [19])
    capsys.readouterr()
    assert corpus.retry("--dry-run", "--json") == 0
    report = last_json(capsys)
    assert (report["retried_samples"], report["appended_samples"], report["committed_rows"]) == (16, 0, 24)
    assert corpus.retry("--json") == 3
    printed = capsys.readouterr().out
    assert "tried again: 16 quarantined samples; 12 are rows now, 4 stay quarantined" in printed
    assert "not_an_image: 1.tar: 1-19 (" in printed
    report = json.loads(printed.splitlines()[-1])
    assert counted(report) == (40, 36, 4)
    assert (report["rows"], report["appended_rows"], report["retried"]) == (36, 12, 16)
    assert corpus.rows() == before + keys(0, [0, 9, 12, 15, 18]) + keys(1, BAD[:-1])
    assert corpus.bad() == keys(0, [3, 6, 19]) + keys(1, [19])
    history = corpus.codes.quarantine(history=True)
    assert history.slice(0, 16) == first_reasons
    assert history.slice(16) == corpus.codes.quarantine()
    assert [(part.first_row, part.num_samples, part.retries) for part in corpus.codes.spec.segments] == [
        (0, 40, 0),
        (24, 56, 16),
    ]
    assert corpus.codes.spec.corpus["num_samples"] == 40
    for command in ("verify", "inspect"):
        app([command, str(corpus.out), "--json"])
        assert counted(last_json(capsys)) == (40, 36, 4)
    assert verify_store(corpus.out).problems == ()

    done = tree(corpus.out)
    assert corpus.run() == 3  # the plan is in: nothing is to be done
    assert tree(corpus.out) == done
    fresh = tmp_path / "fresh.zarr"
    app([*corpus.words()[:5], str(fresh), *corpus.words()[6:]])
    require_same_codes(corpus.codes, vqmill.open_codes(fresh))
    assert app(["decode", str(corpus.out), "--rows", "20:30", "--originals", str(corpus.folder), "--out", str(tmp_path / "x.png")]) == 0  # fmt: skip


@pytest.mark.usefixtures("ray_session")
def test_actors_give_the_same_bytes(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(corpus.out, start := tmp_path / "start.zarr")
    corpus.write([3, 6, 19], [19])
    assert corpus.retry() == 3
    here = tree(corpus.out)
    shutil.rmtree(corpus.out)
    start.rename(corpus.out)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert corpus.retry("--workers", 2) == 3
    assert tree(corpus.out) == here


def test_originals_come_in_the_order_of_rows(corpus: Corpus) -> None:
    from pipelines.corpus.plan import plan_corpus
    from pipelines.decode import original_images

    corpus.write([], [])
    assert corpus.retry() == 0
    images = original_images(plan_corpus(str(corpus.folder)), corpus.codes, range(22, 28), 16, 3)
    names = corpus.rows()[22:28]
    assert names == ["1-16", "1-17", "0-00", "0-03", "0-06", "0-09"]
    for image, name in zip(images, names, strict=True):
        number, index = map(int, name.split("-"))
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(png(20 * number + index)))).transpose(2, 0, 1))


def test_retries_and_growth_take_turns(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([3, 6, 19], [19], [5])
    assert corpus.retry() == 3
    assert "the corpus has 20 samples more than the store" in capsys.readouterr().out
    assert len(corpus.rows()) == 36
    assert corpus.run() == 3
    assert corpus.bad() == [*keys(0, [3, 6, 19]), "1-19", "2-05"]
    corpus.write([6], [], [5], [])
    assert corpus.retry("--json") == 3
    printed = capsys.readouterr().out
    assert "tried again: 5 quarantined samples; 3 are rows now, 2 stay" in printed
    assert counted(json.loads(printed.splitlines()[-1])) == (60, 58, 2)
    assert corpus.run("--json") == 3
    assert counted(last_json(capsys)) == (80, 78, 2)
    corpus.write([], [], [], [])
    assert corpus.retry("--json") == 0
    assert counted(last_json(capsys)) == (80, 80, 0)
    assert corpus.retry("--json") == 0
    printed = capsys.readouterr().out
    assert "no quarantined sample was there" in printed
    assert json.loads(printed.splitlines()[-1])["retried"] == 0
    assert sorted(corpus.rows()) == [key for number in range(4) for key in good(number, [])]
    assert [(part.num_samples, part.retries) for part in corpus.codes.spec.segments] == [
        (40, 0), (56, 16), (76, 0), (81, 5), (101, 0), (103, 2),
    ]  # fmt: skip
    samples = corpus.codes.samples()
    places = zip(samples["input_shard"].to_pylist(), samples["index"].to_pylist(), strict=True)
    assert [f"{shard}-{index:02d}" for shard, index in places] == corpus.rows()
    assert verify_store(corpus.out).problems == ()


def killed(before: dict[str, bytes], after: Path, store: Path, *, some: Callable[[str], bool]) -> None:
    """A store as a killed retry leaves it: the segment is there, and some of the files that it writes."""
    spec, done = read_spec(store), read_spec(after)
    begun = replace(spec, segments=done.segments, complete=False)
    assert tree(store) == before
    (store / "zarr.json").write_bytes(group_metadata(begun))
    for name, data in tree(after).items():
        if name != "zarr.json" and some(name) and before.get(name) != data:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(data)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_killed_retry_ends_as_a_quiet_one(corpus: Corpus, tmp_path: Path, ragged: bool) -> None:
    if ragged:  # the last Zarr shard is opened again; what it held comes from samples that are good by now
        corpus.write(BAD, BAD, [1, 2, 3, 17])
        assert corpus.run() == 3
    start = tmp_path / "start.zarr"
    shutil.copytree(corpus.out, start)
    corpus.write([3, 6, 19], [19], *([[2]] if ragged else []))
    assert corpus.retry() == 3
    after = tmp_path / "after.zarr"
    corpus.out.rename(after)
    assert vqmill.open_codes(start).quarantine().num_rows == (20 if ragged else 16)
    last = vqmill.open_codes(start).spec.num_commits - 1
    states: list[Callable[[str], bool]] = [
        lambda name: False,
        lambda name: not name.startswith("commits/"),
        lambda name: name != f"commits/shard-{last + 1:06d}.json" and not name.endswith("zarr.json"),
        lambda name: name.startswith(("top/c/", "quarantine/")),
    ]
    for some in states:
        shutil.rmtree(corpus.out, ignore_errors=True)
        shutil.copytree(start, corpus.out)
        killed(tree(start), after, corpus.out, some=some)
        readable = vqmill.open_codes(corpus.out)  # what was finished before stays readable
        assert readable.quarantine() == vqmill.open_codes(start).quarantine()
        assert readable.sample_keys() == vqmill.open_codes(start).sample_keys()
        assert corpus.retry() == 3
        assert tree(corpus.out) == tree(after)


def test_the_same_command_without_the_flag_ends_a_killed_retry_too(corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(corpus.out, start := tmp_path / "start.zarr")
    corpus.write([3], [])
    assert corpus.retry() == 3
    corpus.out.rename(after := tmp_path / "after.zarr")
    start.rename(corpus.out)
    killed(tree(corpus.out), after, corpus.out, some=lambda name: False)
    corpus.write([3], [], [])
    assert corpus.run() == 3  # the retry, and then what the corpus has more
    assert [(part.first_row, part.num_samples, part.retries) for part in corpus.codes.spec.segments] == [
        (0, 40, 0),
        (24, 56, 16),
        (39, 76, 0),
    ]
    assert len(corpus.rows()) == 59
    assert verify_store(corpus.out).problems == ()


def test_lost_files_are_made_again_as_they_were(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([3, 6, 19], [19], [5])
    assert corpus.retry() == 3
    assert corpus.run() == 3
    done, spec = tree(corpus.out), read_spec(corpus.out)
    for name in ("top/c/0/0/0", "samples/part-000002.parquet", "bottom/c/3/0/0", "label/c/5"):
        (corpus.out / name).unlink()
    assert not repair_store(corpus.out).remaining
    assert corpus.run() == 3
    assert tree(corpus.out) == done
    (corpus.out / "quarantine/part-000001.parquet").write_bytes(b"cut")  # says what was tried again: only a copy has it
    found = verify_store(corpus.out)
    assert [problem.advice.split(",")[0] for problem in found.problems] == ["Restore it from a copy"]
    assert repair_store(corpus.out).remaining == found.problems
    assert corpus.run() == 1
    assert "quarantine/part-000001.parquet" in capsys.readouterr().err
    (corpus.out / "quarantine/part-000001.parquet").write_bytes(done["quarantine/part-000001.parquet"])
    assert (tree(corpus.out), read_spec(corpus.out)) == (done, spec)


def test_a_lost_tail_is_given_up_only_behind_the_retry(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([3], [])
    assert corpus.retry() == 3
    done = tree(corpus.out)
    for name in ("commits/shard-000003.json", "commits/shard-000004.json"):
        (corpus.out / name).unlink()
    assert not repair_store(corpus.out).remaining
    assert corpus.run() == 3
    assert tree(corpus.out) == done
    for shard in (2, 3, 4):
        (corpus.out / f"commits/shard-{shard:06d}.json").unlink()
    found = verify_store(corpus.out)
    assert {problem.advice.split(",")[0] for problem in found.damage} == {"Restore it from a copy"}
    assert repair_store(corpus.out).remaining


def test_a_span_that_begins_otherwise_than_what_is_committed_stops_the_job(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tree(corpus.out)
    (corpus.out / "commits/shard-000002.json").unlink()
    assert not repair_store(corpus.out).remaining
    for bad in (BAD[1:], [index for index in range(20) if index not in (17, 18)]):  # sample 0 is good by now; few are
        corpus.write(BAD, bad)
        assert corpus.run() == 1
        assert (
            "the corpus no longer gives the last 4 rows that were committed (before row 16)" in capsys.readouterr().err
        )
    corpus.write(BAD, BAD)
    assert corpus.run() == 3
    assert tree(corpus.out) == done


def test_copies_hold_what_counts(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([3, 6, 19], [19])
    assert corpus.retry() == 3
    for words in ((corpus.out, "--out"), (corpus.out, corpus.out, "--out")):
        out = tmp_path / f"{len(words)}.zarr"
        assert app(["merge", *map(str, words), str(out), "--json"]) == 3
        times = len(words) - 1
        assert counted(last_json(capsys)) == (40 * times, 36 * times, 4 * times)
        copied = vqmill.open_codes(out)
        assert copied.quarantine()["key"].to_pylist() == corpus.bad() * times
        assert copied.quarantine(history=True) == copied.quarantine()
        assert copied.sample_keys() == corpus.rows() * times
        assert verify_store(out).problems == ()
    assert app(["slice", str(corpus.out), "--rows", "20:30", "--out", str(tmp_path / "s.zarr")]) == 0
    assert vqmill.open_codes(tmp_path / "s.zarr").sample_keys() == corpus.rows()[20:30]
    assert app([*corpus.words()[:5], str(tmp_path / "2.zarr"), "--retry-quarantined", *corpus.words()[6:]]) == 2
    assert "not made by tokenize" in capsys.readouterr().err


def test_restored_files_of_another_size(
    tmp_path: Path, tokenizer_folder: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Corpus(tmp_path, tokenizer_folder)
    for number in range(12):
        (made.folder / f"{number:02d}.png").write_bytes(png(number) if number % 3 else png(number)[:300])
    assert made.run() == 3
    for number in (0, 3):
        (made.folder / f"{number:02d}.png").write_bytes(png(number))
    assert made.run() == 2
    assert "first give --retry-quarantined" in capsys.readouterr().err
    (made.folder / "055.png").write_bytes(png(55))  # between the others: places have changed
    before = tree(made.out)
    assert made.retry() == 2
    assert "holds sample '055' of 055.png, which" in capsys.readouterr().err
    (made.folder / "055.png").rename(made.folder / "55.png")
    assert tree(made.out) == before
    assert made.retry() == 3
    assert made.rows() == [f"{number:02d}" for number in (1, 2, 4, 5, 7, 8, 10, 11, 0, 3)]
    assert made.run() == 3
    assert made.rows()[10:] == ["55"]
    (made.folder / "11.png").unlink()
    (made.folder / "06.png").write_bytes(png(6))
    assert made.retry() == 2
    assert "which" in capsys.readouterr().err
    (made.folder / "11.png").write_bytes(png(11))
    (made.folder / "55.png").unlink()
    assert made.retry() == 2
    assert "has 12 samples where" in capsys.readouterr().err


def test_a_store_of_nothing_gets_its_first_rows(
    tmp_path: Path, tokenizer_folder: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Corpus(tmp_path, tokenizer_folder)
    assert made.retry() == 2
    made.write(range(20))
    assert made.retry() == 2
    assert "no store there whose samples could be tried again" in capsys.readouterr().err
    assert made.run() == 3
    assert made.retry() == 3  # all still bad
    made.write([7])
    assert made.retry() == 3
    assert (len(made.rows()), made.bad()) == (19, ["0-07"])
    assert made.codes.quarantine(history=True).num_rows == 41
    assert verify_store(made.out).problems == ()


def test_other_stores_are_refused(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(corpus.out)
    assert corpus.retry("--batch-size", 8) == 2
    assert "tokenizer.batch_size: there 32, now 8" in capsys.readouterr().err
    assert corpus.retry("--limit", 30) == 2
    assert "has 30 samples where" in capsys.readouterr().err
    assert tree(corpus.out) == before
    spec = read_spec(corpus.out)
    (corpus.out / "zarr.json").write_bytes(group_metadata(replace(spec, complete=False)))
    assert corpus.retry() == 2
    assert "To finish it, give the same command without --retry-quarantined" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["tars", "files"])
def test_in_a_bucket_as_on_the_disk(
    form: str, s3: Any, address: str, tmp_path: Path, tokenizer_folder: Path, in_this_process: None
) -> None:
    """A corpus and its store there: retried, appended to, and a lost file made again."""
    corpus = Corpus(tmp_path, tokenizer_folder)
    here, there = corpus.folder, f"{address}/corpus"

    def change(bad: Sequence[int], numbers: Sequence[int]) -> None:
        for old in here.iterdir():
            old.unlink()
        for number in numbers:
            if form == "tars":
                write_tar(here, number, bad)
            else:
                (here / f"{number:02d}.png").write_bytes(b"\0" * 300 if number in bad else png(number))
        s3.upload(here, there)

    def run(*more: str) -> None:
        words = ("--tokenizer", str(corpus.tokenizer), "--shard-rows", "8", *more)
        for folder, out in ((str(here), str(corpus.out)), (there, f"{address}/codes.zarr")):
            assert app(["tokenize", folder, "--out", out, *words]) == 3  # some stay bad

    for restored, numbers, more in (([], range(2), []), ([3], range(2), ["--retry-quarantined"]), ([3], range(3), [])):
        if form == "files":
            numbers = range(20 + 4 * (len(numbers) - 2))
        change([number for number in BAD if number not in restored], numbers)
        run(*more)
        made, expected = s3.objects(f"{address}/codes.zarr"), tree(corpus.out)
        different = {name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name)}
        assert different == {"zarr.json"}, "which names the corpus otherwise"
    segments = vqmill.open_codes(f"{address}/codes.zarr").spec.segments
    assert [segment.retries for segment in segments] == [0, 16 if form == "tars" else 8, 0]
    Bucket(f"{address}/codes.zarr").delete(["top/c/0/0/0"])
    assert not repair_store(f"{address}/codes.zarr").remaining
    run()
    assert s3.objects(f"{address}/codes.zarr") == made
