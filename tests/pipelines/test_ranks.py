"""Ranks of a data-parallel run end alike, stop together, and are started again when one is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from pipelines.context import LocalContext
from pipelines.fit import fit
from pipelines.training_log import METRICS_FILE, NOTES_FILE
from vqmill.checkpoint import load_checkpoint

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


def test_two_ranks_agree_to_the_bit(tmp_path: Path) -> None:
    run_ranks(tmp_path, "plain")
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


def test_one_worker_goes_on_where_two_stopped(tmp_path: Path, monkeypatch) -> None:
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


def test_a_lost_rank_is_started_again_and_the_result_is_the_same(tmp_path: Path) -> None:
    """On Ray Train, with a rank that is really killed; and a failure that would come again is not tried again."""
    done = subprocess.run(
        [sys.executable, HERE / "ray_main.py", tmp_path], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "killed" / "marker").exists()
    assert (tmp_path / "whole" / "final.safetensors").read_bytes() == (
        tmp_path / "killed" / "final.safetensors"
    ).read_bytes()
    records = [json.loads(line) for line in (tmp_path / "killed" / METRICS_FILE).read_text().splitlines()]
    assert [record for record in records if "restart" in record] == [{"step": 4, "restart": 1}]
    assert "restart 1 of 3 at most), from step 4" in done.stderr
    assert (
        not (tmp_path / "whole" / NOTES_FILE).exists() or "restart" not in (tmp_path / "whole" / NOTES_FILE).read_text()
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "broken": ["CodesError", "the corpus is gone", 1],
        "poisoned": ["RunFailed", True, 1],
        "unlucky": ["RunFailed", True, 1],
    }
