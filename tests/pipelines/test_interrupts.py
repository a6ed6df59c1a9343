"""Ctrl-C while training: a resume point after the step in hand; and what the command line says when a job ends early."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

import tokenizer
from pipelines import interrupts
from pipelines.app import run
from pipelines.cli import app
from pipelines.context import LocalContext
from pipelines.errors import Diverged, RunFailed
from pipelines.fit import FitConfig, fit
from pipelines.interrupts import PatientInterrupt
from pipelines.options import Common
from pipelines.progress import Meter
from pipelines.training_log import METRICS_FILE, NOTES_FILE
from pipelines.training_state import RESUME_FILE
from vqmill.checkpoint import load_checkpoint
from vqmill.errors import CodesError, UsageError
from vqmill.step import StepOutput

CONFIG = FitConfig(steps=12, batch_size=4, learning_rate=0.05, weight_ema=0.9, validate_every=5, save_every=4)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


class Noisy(nn.Module):
    """Learns a mean under dropout; Ctrl-C is pressed so many times in the middle of one of its updates."""

    def __init__(self, stop_at: int = 0, times: int = 1) -> None:
        super().__init__()
        self.mean, self.dropout = nn.Parameter(torch.zeros(3)), nn.Dropout(0.5)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.stop_at, self.times = stop_at, times

    def forward(self, batch: Mapping[str, Tensor]) -> StepOutput:
        loss = (self.dropout(batch["x"]) - self.mean).square().mean()
        return StepOutput(loss, {"loss": loss.detach()})

    def update(self, *args: Any) -> dict[str, Tensor]:
        if int(self.updates) == self.stop_at - 1:
            for _ in range(self.times):
                ctrl_c()
        self.updates += 1
        return {}

    def evaluate(self, batches: Any) -> dict[str, float]:
        return {"loss": float(self.mean.detach().square().sum())}


class Numbers:
    """Batches that are a function of their place."""

    place = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.place += 1
            yield {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(self.place))}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = state["place"]


def train(folder: Path, step: Noisy, saved: list[int] | None = None) -> Noisy:
    folder.mkdir(exist_ok=True)

    def before_save() -> None:
        if saved is not None:
            saved.append(int(step.updates))

    fit(step, Numbers(), list, CONFIG, LocalContext(torch.device("cpu")), folder, before_save=before_save)
    return step


def logged(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "samples_per_second"} for record in records]


@pytest.mark.parametrize("stop_at", [1, 5, 10, 12])
def test_ctrl_c_makes_a_resume_point_after_the_step_in_hand(tmp_path: Path, stop_at: int) -> None:
    whole = train(tmp_path / "whole", Noisy())
    saved: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", Noisy(stop_at), saved)
    assert saved == [done for done in (4, 8) if done < stop_at] + [stop_at]
    assert load_checkpoint(tmp_path / "stopped" / RESUME_FILE)[1]["done"] == stop_at
    assert f"stopped at step {stop_at}" in (tmp_path / "stopped" / NOTES_FILE).read_text()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = train(tmp_path / "stopped", Noisy())
    assert torch.equal(whole.mean, again.mean)
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    step = Noisy(stop_at=6, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, step)
    assert int(step.updates) == 5, "the step in hand was not finished"
    assert load_checkpoint(tmp_path / RESUME_FILE)[1]["done"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ranks_and_other_threads_leave_ctrl_c_alone() -> None:
    with PatientInterrupt(wanted=False), pytest.raises(KeyboardInterrupt):
        ctrl_c()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(PatientInterrupt().__enter__).result()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PatientInterrupt() as interrupt:
            ctrl_c()
            assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_nobody_looked_for_comes_through_in_the_end() -> None:
    interrupt = PatientInterrupt()
    with pytest.raises(KeyboardInterrupt), interrupt:
        ctrl_c()
    assert interrupt.asked


class Eats:
    """Ctrl-C is pressed in its destructor, where Python says so on stderr and goes on."""

    def __del__(self) -> None:
        ctrl_c()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_has_swallowed_comes_back_with_the_next_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_stopped", False)
    before = signal.signal(signal.SIGINT, interrupts.stop)
    try:
        with PatientInterrupt() as interrupt:
            ctrl_c()
            assert interrupt.asked, "training still makes a resume point first"
            interrupt.asked = False
        assert signal.getsignal(signal.SIGINT) is interrupts.stop
        show = Meter("tokenizing", "samples", Console(file=io.StringIO()), None)
        show(1, 2)
        Eats()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(show, 1, 2).result()
        with pytest.raises(KeyboardInterrupt):
            show(1, 2)
    finally:
        signal.signal(signal.SIGINT, before)


def corpus(path: Path) -> str:
    """One tar: 20 images and one that does not decode, which training meets in its first epoch."""
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            writer.write({"__key__": f"{index:03d}", "png": file.getvalue()})
        writer.write({"__key__": "broken", "png": b"\x89PNG\r\n\x1a\n cut"})
    return str(path)


def test_the_command_goes_on_and_remembers_what_it_had_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text("[tokenizer]\nsize = 16\ncodebook_size = 16\ncode_dim = 4\nhidden_dim = 8\nresidual_dim = 4\n")
    images = corpus(tmp_path / "images.tar")

    def command(out: str) -> int:
        return app(
            ["train-tokenizer", images, "--config", str(config), "--steps", "16", "--batch-size", "4", "--holdout", "0.2",
             "--out", str(tmp_path / out)]
        )  # fmt: skip

    assert command("whole") == 3
    real = tokenizer.TokenizerStep.update
    updates = []

    def update(*args: Any) -> dict[str, Tensor]:
        updates.append(1)
        if len(updates) == 9:
            ctrl_c()
        return real(*args)

    monkeypatch.setattr(tokenizer.TokenizerStep, "update", update)
    assert command("stopped") == 1
    assert "stopped. Whatever was committed, or saved as a resume point, is kept" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()
    assert command("stopped") == 3
    said = capsys.readouterr().err
    assert len(updates) == 16, "no step is done again"
    assert "a short run, of 16 steps: warmup_steps is 1 instead of 100, start_step is 2 instead of 100" in said
    found = [tokenizer.load(tmp_path / name).fingerprint for name in ("whole", "stopped")]
    assert found[0] == found[1]
    lines = [pq.read_table(tmp_path / name / "quarantine.parquet").to_pylist() for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert "broken" in lines[0][0]["key"]


@pytest.mark.parametrize(
    ("error", "code", "again"),
    [
        (UsageError("--size 33"), 2, False),
        (CodesError("wrong channels"), 1, False),
        (Diverged("the loss is nan"), 1, False),
        (RunFailed("a worker was lost"), 1, True),
        (OSError("no space left on device"), 1, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_command_is_only_offered_again_where_that_may_help(
    error: Exception, code: int, again: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> Any:
        raise error

    assert run(Common(), job) == code
    said = capsys.readouterr().err
    assert f"error: {error}" in said
    assert ("To try again" in said) == again
