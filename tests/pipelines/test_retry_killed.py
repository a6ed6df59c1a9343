"""Retries that are killed, and files of them that are lost: the store ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vqmill
from vqmill.layout import group_metadata, read_spec
from vqmill.repair import repair_store
from vqmill.verify import verify_store


@pytest.mark.usefixtures("ray_session")
def test_actors_give_the_same_bytes(corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(corpus.out, start := tmp_path / "start.zarr")
    corpus.write([3, 6, 19], [19])
    assert corpus.retry() == 3
    here = corpus.tree(corpus.out)
    shutil.rmtree(corpus.out)
    start.rename(corpus.out)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert corpus.retry("--workers", 2) == 3
    assert corpus.tree(corpus.out) == here


def killed(corpus: Any, before: dict[str, bytes], after: Path, store: Path, *, some: Callable[[str], bool]) -> None:
    """A store as a killed retry leaves it: the segment is there, and some of the files that it writes."""
    spec, done = read_spec(store), read_spec(after)
    begun = replace(spec, segments=done.segments, complete=False)
    assert corpus.tree(store) == before
    (store / "zarr.json").write_bytes(group_metadata(begun))
    for name, data in corpus.tree(after).items():
        if name != "zarr.json" and some(name) and before.get(name) != data:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(data)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_killed_retry_ends_as_a_quiet_one(corpus: Any, tmp_path: Path, ragged: bool) -> None:
    if ragged:  # the last Zarr shard is opened again; what it held comes from samples that are good by now
        corpus.write(corpus.BAD, corpus.BAD, [1, 2, 3, 17])
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
        killed(corpus, corpus.tree(start), after, corpus.out, some=some)
        readable = vqmill.open_codes(corpus.out)  # what was finished before stays readable
        assert readable.quarantine() == vqmill.open_codes(start).quarantine()
        assert readable.sample_keys() == vqmill.open_codes(start).sample_keys()
        assert corpus.retry() == 3
        assert corpus.tree(corpus.out) == corpus.tree(after)


def test_the_same_command_without_the_flag_ends_a_killed_retry_too(corpus: Any, tmp_path: Path) -> None:
    shutil.copytree(corpus.out, start := tmp_path / "start.zarr")
    corpus.write([3], [])
    assert corpus.retry() == 3
    corpus.out.rename(after := tmp_path / "after.zarr")
    start.rename(corpus.out)
    killed(corpus, corpus.tree(corpus.out), after, corpus.out, some=lambda name: False)
    corpus.write([3], [], [])
    assert corpus.run() == 3  # the retry, and then what the corpus has more
    assert [(part.first_row, part.num_samples, part.retries) for part in corpus.codes.spec.segments] == [
        (0, 40, 0),
        (24, 56, 16),
        (39, 76, 0),
    ]
    assert len(corpus.rows()) == 59
    assert verify_store(corpus.out).problems == ()


def test_lost_files_are_made_again_as_they_were(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([3, 6, 19], [19], [5])
    assert corpus.retry() == 3
    assert corpus.run() == 3
    done, spec = corpus.tree(corpus.out), read_spec(corpus.out)
    for name in ("top/c/0/0/0", "samples/part-000002.parquet", "bottom/c/3/0/0", "label/c/5"):
        (corpus.out / name).unlink()
    assert not repair_store(corpus.out).remaining
    assert corpus.run() == 3
    assert corpus.tree(corpus.out) == done
    (corpus.out / "quarantine/part-000001.parquet").write_bytes(b"cut")  # says what was tried again: only a copy has it
    found = verify_store(corpus.out)
    assert [problem.advice.split(",")[0] for problem in found.problems] == ["Restore it from a copy"]
    assert repair_store(corpus.out).remaining == found.problems
    assert corpus.run() == 1
    assert "quarantine/part-000001.parquet" in capsys.readouterr().err
    (corpus.out / "quarantine/part-000001.parquet").write_bytes(done["quarantine/part-000001.parquet"])
    assert (corpus.tree(corpus.out), read_spec(corpus.out)) == (done, spec)


def test_a_lost_tail_is_given_up_only_behind_the_retry(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([3], [])
    assert corpus.retry() == 3
    done = corpus.tree(corpus.out)
    for name in ("commits/shard-000003.json", "commits/shard-000004.json"):
        (corpus.out / name).unlink()
    assert not repair_store(corpus.out).remaining
    assert corpus.run() == 3
    assert corpus.tree(corpus.out) == done
    for shard in (2, 3, 4):
        (corpus.out / f"commits/shard-{shard:06d}.json").unlink()
    found = verify_store(corpus.out)
    assert {problem.advice.split(",")[0] for problem in found.damage} == {"Restore it from a copy"}
    assert repair_store(corpus.out).remaining


def test_a_span_that_begins_otherwise_than_what_is_committed_stops_the_job(
    corpus: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done = corpus.tree(corpus.out)
    (corpus.out / "commits/shard-000002.json").unlink()
    assert not repair_store(corpus.out).remaining
    for bad in (
        corpus.BAD[1:],
        [index for index in range(20) if index not in (17, 18)],
    ):  # sample 0 is good by now; few are
        corpus.write(corpus.BAD, bad)
        assert corpus.run() == 1
        assert (
            "the corpus no longer gives the last 4 rows that were committed (before row 16)" in capsys.readouterr().err
        )
    corpus.write(corpus.BAD, corpus.BAD)
    assert corpus.run() == 3
    assert corpus.tree(corpus.out) == done


def test_a_retry_killed_in_the_middle_ends_as_a_quiet_one(empty_corpus: Any, tmp_path: Path) -> None:
    """A real process with its Ray, and SIGKILL; 380 samples are tried again, in 46 commits."""
    corpus = empty_corpus
    corpus.write(*[range(1, 20)] * 20)
    assert corpus.run() == 3
    shutil.copytree(corpus.out, start := tmp_path / "start.zarr")
    corpus.write(*[[7]] * 20)
    assert corpus.retry() == 3
    quiet = corpus.tree(corpus.out)
    shutil.rmtree(corpus.out)
    start.rename(corpus.out)
    before = len(list(corpus.out.glob("commits/*.json")))

    command = [sys.executable, "-m", "pipelines.cli", *corpus.words("--retry-quarantined", "--workers")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    job = subprocess.Popen([*command, "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while len(list(corpus.out.glob("commits/*.json"))) < before + 5:
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not read_spec(corpus.out).complete, "the job was too fast to be killed"
    again = subprocess.run([*command, "2"], capture_output=True, text=True, env=environment, timeout=200)
    assert again.returncode == 3, again.stderr
    assert "tried again: 380 quarantined samples; 360 are rows now, 20 stay quarantined" in again.stdout
    assert corpus.tree(corpus.out) == quiet
