"""Ranks of a data-parallel run end alike, stop together, and are started again when one is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines import train
from pipelines.context import LocalContext
from pipelines.errors import Diverged, RunFailed
from pipelines.fit import fit
from pipelines.training_log import METRICS_FILE, NOTES_FILE
from pipelines.training_state import RESUME_FILE
from vqmill.checkpoint import load_checkpoint
from vqmill.errors import CodesError, UsageError

HERE = Path(__file__).parent


def run_ranks(folder: Path, case: str) -> None:
    """Two ranks without Ray."""
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "rank_main.py", folder, str(rank), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(folder, "plain")
    return folder


def test_two_ranks_agree_to_the_bit(uninterrupted: Path) -> None:
    assert (uninterrupted / "fingerprint-0").read_text() == (uninterrupted / "fingerprint-1").read_text()


def test_two_ranks_agree_when_codebooks_are_weights_that_begin_late(tmp_path: Path) -> None:
    run_ranks(tmp_path, "gradient")
    assert (tmp_path / "fingerprint-0").read_text() == (tmp_path / "fingerprint-1").read_text()


def test_ranks_stop_together_and_know_whose_batch_it_was(tmp_path: Path) -> None:
    run_ranks(tmp_path, "poison")
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "at step 5 (learning rate" in errors[0]
    assert "from rank 1." in errors[0]
    report = json.loads((tmp_path / "nonfinite.json").read_bytes())
    assert (report["rank"], report["nonfinite_ranks"], report["stream"]) == (1, [1], {"place": 4})
    assert report["micro_batches"][0]["batch"]["images"]["nonfinite"] == 1
    images = load_checkpoint(tmp_path / "nonfinite.safetensors")[0]["0.images"]
    assert torch.nonzero(images.isnan()).tolist() == [[3, 0, 0, 0]]
    assert (tmp_path / "nonfinite.png").exists()


def test_one_worker_goes_on_where_two_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import rank_main

    class All(rank_main.Pictures):
        """Both ranks' pictures."""

        def __iter__(self):
            while True:
                first = self.place * 16 % 64
                self.place += 1
                yield {"images": self.images[first : first + 16]}

    run_ranks(tmp_path, "stop")
    stream, step, told = All(0), rank_main.make_step(), []
    context = LocalContext(torch.device("cpu"))
    fit(step, stream, lambda: [{"images": stream.images}], rank_main.CONFIG, context, tmp_path, lambda done, _: told.append(done))  # fmt: skip
    assert told == [5, 6, 7, 8, 9, 10]
    assert stream.place == 10
    assert "from step 4 with another number of workers, 1 instead of 2" in (tmp_path / NOTES_FILE).read_text()


def test_a_lost_rank_is_started_again_and_the_result_is_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    """On Ray Train, with a rank that is really killed; and not when `max_failures` is 0."""
    done = subprocess.run(
        [sys.executable, HERE / "ray_main.py", tmp_path], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert list(outcomes) == ["unlucky"]
    assert "max_failures in [fit] is 0" in outcomes["unlucky"]
    assert (tmp_path / "killed" / "marker").exists()
    resumed, whole = (load_checkpoint(folder / RESUME_FILE)[0] for folder in (tmp_path / "killed", uninterrupted))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items()), "weights, codebooks and moments"
    records = [json.loads(line) for line in (tmp_path / "killed" / METRICS_FILE).read_text().splitlines()]
    assert [record for record in records if "restart" in record] == [{"step": 4, "restart": 1}]
    assert "killed: a worker failed: all were started again from step 4 (restart 1; max_failures is 3)" in done.stderr
    assert not (uninterrupted / NOTES_FILE).exists()


@pytest.mark.parametrize("kind", [CodesError, UsageError, Diverged, RunFailed])
def test_a_failure_that_would_come_again_is_not_tried_again(tmp_path: Path, kind: type[Exception]) -> None:
    tried = []

    def run() -> None:
        tried.append(1)
        raise kind("the reason")

    if issubclass(kind, RunFailed):  # all ranks raise it together: no need for Ray to end them
        train._unless_stopped(tmp_path, 1, run)
    else:
        with pytest.raises(kind):
            train._unless_stopped(tmp_path, 1, run)
    train._unless_stopped(tmp_path, 1, run)
    assert tried == [1]
    with pytest.raises(kind, match="the reason") as raised:
        train._raise_stopped(tmp_path)
    assert type(raised.value) is kind


def test_another_failure_is_tried_again(tmp_path: Path) -> None:
    def run() -> None:
        raise RuntimeError("connection closed by peer")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            train._unless_stopped(tmp_path, 0, run)
    train._raise_stopped(tmp_path)
