"""Samples that were set aside and are tried again: each is in the store once, whatever happens in between."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vqmill
from pipelines.cli import app
from vqmill.bucket import Bucket
from vqmill.layout import group_metadata, read_spec
from vqmill.repair import repair_store
from vqmill.verify import verify_store


def keys(number: int, indices: Sequence[int]) -> list[str]:
    return [f"{number}-{index:02d}" for index in indices]


def good(number: int, bad: Sequence[int]) -> list[str]:
    return keys(number, [index for index in range(20) if index not in bad])


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
    corpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = good(0, corpus.BAD) + good(1, corpus.BAD)
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
    assert corpus.rows() == before + keys(0, [0, 9, 12, 15, 18]) + keys(1, corpus.BAD[:-1])
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

    done = corpus.tree(corpus.out)
    assert corpus.run() == 3  # the plan is in: nothing is to be done
    assert corpus.tree(corpus.out) == done
    fresh = tmp_path / "fresh.zarr"
    app([*corpus.words()[:5], str(fresh), *corpus.words()[6:]])
    require_same_codes(corpus.codes, vqmill.open_codes(fresh))
    assert app(["decode", str(corpus.out), "--rows", "20:30", "--originals", str(corpus.folder), "--out", str(tmp_path / "x.png")]) == 0  # fmt: skip


def test_originals_come_in_the_order_of_rows(corpus: Any) -> None:
    from pipelines.corpus.plan import plan_corpus
    from pipelines.decode import original_images

    corpus.write([], [])
    assert corpus.retry() == 0
    images = original_images(plan_corpus(str(corpus.folder)), corpus.codes, range(22, 28), 16, 3)
    names = corpus.rows()[22:28]
    assert names == ["1-16", "1-17", "0-00", "0-03", "0-06", "0-09"]
    for image, name in zip(images, names, strict=True):
        number, index = map(int, name.split("-"))
        assert np.array_equal(
            image, np.asarray(Image.open(io.BytesIO(corpus.png(20 * number + index)))).transpose(2, 0, 1)
        )


def test_retries_and_growth_take_turns(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_copies_hold_what_counts(corpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_restored_files_of_another_size(empty_corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = empty_corpus
    for number in range(12):
        (made.folder / f"{number:02d}.png").write_bytes(made.png(number) if number % 3 else made.png(number)[:300])
    assert made.run() == 3
    for number in (0, 3):
        (made.folder / f"{number:02d}.png").write_bytes(made.png(number))
    assert made.run() == 2
    assert "first give --retry-quarantined" in capsys.readouterr().err
    (made.folder / "055.png").write_bytes(made.png(55))  # between the others: places have changed
    before = made.tree(made.out)
    assert made.retry() == 2
    assert "holds sample '055' of 055.png, which" in capsys.readouterr().err
    (made.folder / "055.png").rename(made.folder / "55.png")
    assert made.tree(made.out) == before
    assert made.retry() == 3
    assert made.rows() == [f"{number:02d}" for number in (1, 2, 4, 5, 7, 8, 10, 11, 0, 3)]
    assert made.run() == 3
    assert made.rows()[10:] == ["55"]
    (made.folder / "11.png").unlink()
    (made.folder / "06.png").write_bytes(made.png(6))
    assert made.retry() == 2
    assert "which" in capsys.readouterr().err
    (made.folder / "11.png").write_bytes(made.png(11))
    (made.folder / "55.png").unlink()
    assert made.retry() == 2
    assert "has 12 samples where" in capsys.readouterr().err


def test_a_store_of_nothing_gets_its_first_rows(empty_corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = empty_corpus
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


def test_other_stores_are_refused(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = corpus.tree(corpus.out)
    assert corpus.retry("--batch-size", 8) == 2
    assert "tokenizer.batch_size: there 32, now 8" in capsys.readouterr().err
    assert corpus.retry("--sample-timeout", 90) == 2
    assert "tokenizer.sample_timeout_seconds: there null, now 90" in capsys.readouterr().err
    assert corpus.retry("--limit", 30) == 2
    assert "has 30 samples where" in capsys.readouterr().err
    assert corpus.tree(corpus.out) == before
    spec = read_spec(corpus.out)
    (corpus.out / "zarr.json").write_bytes(group_metadata(replace(spec, complete=False)))
    assert corpus.retry() == 2
    assert "To finish it, give the same command without --retry-quarantined" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["tars", "files"])
def test_in_a_bucket_as_on_the_disk(form: str, s3: Any, address: str, empty_corpus: Any) -> None:
    """A corpus and its store there: retried, appended to, and a lost file made again."""
    corpus = empty_corpus
    here, there = corpus.folder, f"{address}/corpus"

    def change(bad: Sequence[int], numbers: Sequence[int]) -> None:
        for old in here.iterdir():
            old.unlink()
        for number in numbers:
            if form == "tars":
                corpus.write_tar(here, number, bad)
            else:
                (here / f"{number:02d}.png").write_bytes(b"\0" * 300 if number in bad else corpus.png(number))
        s3.upload(here, there)

    def run(*more: str) -> None:
        words = ("--tokenizer", str(corpus.tokenizer), "--shard-rows", "8", *more)
        for folder, out in ((str(here), str(corpus.out)), (there, f"{address}/codes.zarr")):
            assert app(["tokenize", folder, "--out", out, *words]) == 3  # some stay bad

    for restored, numbers, more in (([], range(2), []), ([3], range(2), ["--retry-quarantined"]), ([3], range(3), [])):
        if form == "files":
            numbers = range(20 + 4 * (len(numbers) - 2))
        change([number for number in corpus.BAD if number not in restored], numbers)
        run(*more)
        made, expected = s3.objects(f"{address}/codes.zarr"), corpus.tree(corpus.out)
        different = {name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name)}
        assert different == {"zarr.json"}, "which names the corpus otherwise"
    segments = vqmill.open_codes(f"{address}/codes.zarr").spec.segments
    assert [segment.retries for segment in segments] == [0, 16 if form == "tars" else 8, 0]
    Bucket(f"{address}/codes.zarr").delete(["top/c/0/0/0"])
    assert not repair_store(f"{address}/codes.zarr").remaining
    run()
    assert s3.objects(f"{address}/codes.zarr") == made
