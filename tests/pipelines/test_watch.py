"""What people see of a job under way, and the statistics that it leaves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from pipelines import progress, watch
from pipelines.assembly import SpanFacts
from pipelines.corpus.plan import FileBundle, InputShard
from pipelines.progress import Meter
from pipelines.shard_log import shard_log
from pipelines.watch import Watch
from vqmill.commits import Counts

SHARDS = [InputShard(index, f"{index:06d}.tar", 300, 1000 + index, FileBundle("x", ())) for index in range(3)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that the display goes by."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


class Seen:
    """A watch over three input shards, and what it says."""

    def __init__(self, before: Counts | None = None, retried: Callable[[int], int] = lambda seen: 0) -> None:
        self.shown: list[tuple[int, int, str]] = []
        self.noted: list[dict[str, Any]] = []
        self.watch = Watch(
            SHARDS,
            before or Counts(),
            900,
            retried,
            lambda *shown: self.shown.append(shown),
            lambda line: self.noted.append(dict(line)),
        )


def facts(index: int, good: int, seconds: float = 1.0, **reasons: int) -> SpanFacts:
    return SpanFacts(index, good, Counts(good, sum(reasons.values())), reasons, seconds)


def test_the_display_counts_earlier_runs_and_names_reasons_and_workers() -> None:
    seen = Seen(Counts(90, 10))
    seen.watch.show()
    assert seen.shown == [(100, 900, "10 quarantined")]
    seen.watch.hired(2)
    seen.watch.began(0, 0, 1)
    seen.watch.arrived(0, 0, facts(1, 40, truncated=3, empty=1))
    assert seen.shown[-1] == (
        144, 900, "14 quarantined (by this run: 3 truncated, 1 empty); 1 of 2 workers busy",
    )  # fmt: skip


def test_without_an_earlier_run_nothing_is_said_of_it() -> None:
    seen = Seen()
    seen.watch.hired(1)
    seen.watch.began(0, 0, 0)
    seen.watch.arrived(0, 0, facts(0, 3))
    seen.watch.arrived(0, 0, facts(1, 3, empty=1))
    assert [note for *_, note in seen.shown] == ["1 of 1 workers busy", "1 quarantined (1 empty); 1 of 1 workers busy"]


def test_samples_that_are_tried_again_count_no_more_as_quarantined() -> None:
    seen = Seen(Counts(90, 10), retried=lambda samples: samples - 100)
    seen.watch.hired(1)
    seen.watch.began(0, 0, 0)
    seen.watch.arrived(0, 0, facts(0, 6, truncated=2))
    assert seen.shown[-1][2].startswith("4 quarantined (by this run: 2 truncated)")


def test_a_silent_worker_and_a_replaced_one_are_mentioned(clock: Callable[[float], None]) -> None:
    seen = Seen()
    seen.watch.hired(2)
    seen.watch.began(0, 0, 0)
    seen.watch.began(1, 2, 0)
    seen.watch.died(0, 0)
    clock(100 + watch.SILENT_SECONDS)
    seen.watch.show()
    assert seen.shown[-1][2] == "1 of 2 workers busy, 1 replaced"
    clock(101 + watch.SILENT_SECONDS)
    seen.watch.began(0, 0, 0)
    seen.watch.show()
    assert seen.shown[-1][2] == "2 of 2 workers busy, 1 replaced, worker 1 gave nothing for 31 s (000002.tar)"


def test_each_input_shard_leaves_a_line() -> None:
    seen = Seen()
    seen.watch.hired(2)
    seen.watch.began(0, 1, 2)
    seen.watch.arrived(0, 1, facts(2, 40, 0.5, truncated=3))
    seen.watch.died(0, 1)
    assert not seen.noted, "it is not done"
    seen.watch.began(1, 1, 3)
    seen.watch.arrived(1, 1, facts(3, 2, 0.25, truncated=1, empty=1))
    seen.watch.ended(1, 1)
    assert seen.noted == [
        {
            "input_shard": 1, "name": "000001.tar", "bytes": 1001, "first_span": 2, "encoded": 42, "quarantined": 5,
            "reasons": {"truncated": 4, "empty": 1}, "rows": 42, "seconds": 0.75, "worker": 1, "deaths": 1,
        }
    ]  # fmt: skip
    assert [worker.facts() for worker in seen.watch.workers] == [
        {"samples": 43, "seconds": 0.5, "deaths": 1},
        {"samples": 4, "seconds": 0.25, "deaths": 0},
    ]


def test_the_log_of_a_failed_job_is_kept_and_no_line_makes_no_file(tmp_path: Path) -> None:
    with shard_log(tmp_path / "codes.zarr") as (file, _):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="lost"), shard_log(tmp_path / "codes.zarr") as (file, note):  # noqa: PT012 - a job that fails
        note({"name": "é"})
        note({"rows": 2})
        raise OSError("lost")
    [path] = (tmp_path / "codes.zarr.runs").iterdir()
    assert str(file) == str(path)
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [{"name": "é"}, {"rows": 2}]


def test_a_log_in_a_bucket_is_written_at_the_end(s3: Any) -> None:
    url = f"s3://{s3.bucket}/logs/codes.zarr"
    with pytest.raises(OSError, match="lost"), shard_log(url) as (file, note):  # noqa: PT012 - a job that fails
        note({"rows": 2})
        note({"rows": 3})
        raise OSError("lost")
    objects = s3.objects(f"s3://{s3.bucket}/logs")
    assert {f"s3://{s3.bucket}/logs/{name}": data for name, data in objects.items()} == {
        str(file): b'{"rows": 2}\n{"rows": 3}\n'
    }


@pytest.mark.usefixtures("ray_session")
def test_a_job_says_what_each_input_shard_and_worker_did(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import app  # the command line as people have it

    corpus, out = tmp_path / "photos", tmp_path / "codes.zarr"
    corpus.mkdir()
    for number in range(12):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(corpus / f"{number:02d}.png")
    (corpus / "05.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    command = [
        "tokenize",
        str(corpus),
        "--tokenizer",
        str(tokenizer_folder),
        "--out",
        str(out),
        "--workers",
        "1",
        "--json",
    ]
    assert app(command) == 3
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    [line] = map(json.loads, Path(report["input_shard_statistics"]).read_text().splitlines())
    assert line.pop("seconds") > 0
    [bundle] = {line.pop("name")}
    assert bundle
    assert line == {
        "input_shard": 0, "bytes": sum(file.stat().st_size for file in corpus.iterdir()), "first_span": 0, "encoded": 11,
        "quarantined": 1, "reasons": report["reasons"], "rows": 11, "worker": 0, "deaths": 0,
    }  # fmt: skip
    [worker] = json.loads((tmp_path / "codes.zarr.run.json").read_bytes())["encoders"]
    assert (worker["samples"], worker["deaths"]) == (12, 0)
    assert app(command) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["input_shard_statistics"] == "", (
        "nothing was to be done"
    )
    assert len(list((tmp_path / "codes.zarr.runs").iterdir())) == 1


def test_a_log_line_every_30_seconds_tells_the_rate_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now, text = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter("tokenizing", "samples", Console(file=text, width=200), None)
    for seconds, done in ((10, 5000), (20, 5100), (39, 5290), (40, 5300), (60, 5500), (71, 5610)):
        now[0] = seconds
        meter(done, 10_000, "well")
    assert text.getvalue().splitlines() == [
        "tokenizing: 5,290 of 10,000 (53%) samples, 10.0/s, 471 s left; well",
        "tokenizing: 5,610 of 10,000 (56%) samples, 10.0/s, 439 s left; well",
    ]


def test_the_bar_does_not_count_an_earlier_run_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(get_time=lambda: now[0], console=Console(file=io.StringIO()))
    meter = Meter("tokenizing", "samples", Console(file=io.StringIO()), bar)
    for seconds, done in ((10, 5000), (20, 5100), (30, 5200)):
        now[0] = seconds
        meter(done, 10_000)
    [task] = bar.tasks
    assert (task.completed, task.total, task.fields["rate"]) == (5200, 10_000, "10.0/s")
    assert task.time_remaining == 480
