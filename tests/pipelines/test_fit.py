"""The training loop: what it promises for any step object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.context import LocalContext
from pipelines.errors import RunFailed
from pipelines.fit import METRICS_FILE, FitConfig, fit
from vqmill.errors import UsageError
from vqmill.step import StepOutput

CONFIG = FitConfig(steps=12, batch_size=8, learning_rate=0.05, warmup_steps=3, validate_every=5, save_every=4)
TRUTH = torch.tensor([[1.0, -2.0, 0.5]])


class LinearStep(nn.Module):
    """Fits a plane, with dropout, and counts what `update` was told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("drawn", torch.zeros(()))

    def forward(self, batch: Mapping[str, Tensor]) -> StepOutput:
        x = batch["x"]
        loss = (self.linear(self.dropout(x)) - x @ TRUTH.T).square().mean()
        return StepOutput(loss, {"half": loss.detach() / 2}, {"count": torch.tensor(float(len(x)))}, {"x": x})

    def update(self, sums: Mapping[str, Tensor], pools: Mapping[str, Tensor], generator: torch.Generator) -> None:
        assert len(pools["x"]) == int(sums["count"])
        self.seen += sums["count"]
        self.drawn += torch.rand((), generator=generator)

    @torch.no_grad()
    def evaluate(self, batches: Any) -> dict[str, float]:
        self.eval()
        losses = [(self.linear(batch["x"]) - batch["x"] @ TRUTH.T).square().mean() for batch in batches]
        self.train()
        return {"loss": float(torch.stack(losses).mean())}


class Numbers:
    """Batches that are a function of their place."""

    def __init__(self, size: int = 8) -> None:
        self.size, self.place = size, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            x = torch.randn(self.size, 3, generator=torch.Generator().manual_seed(self.place))
            self.place += 1
            yield {"x": x}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = state["place"]


class Killed(Exception):
    """Stands for a kill."""


def validation() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(16, 3, generator=torch.Generator().manual_seed(99))}]


def run(
    folder: Path, config: FitConfig = CONFIG, kill_at: int | None = None, size: int = 8
) -> tuple[LinearStep, dict[str, float]]:
    folder.mkdir(exist_ok=True)
    step = LinearStep()

    def on_step(done: int, loss: float) -> None:
        if done == kill_at:
            raise Killed

    return step, fit(step, Numbers(size), validation, config, LocalContext(torch.device("cpu")), folder, on_step)


def test_it_learns_and_reports(tmp_path: Path) -> None:
    step, final = run(tmp_path, replace(CONFIG, steps=300, learning_rate=0.1))
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    first = next(record["loss"] for record in records if "loss" in record)
    assert final["loss"] < 0.2 * first
    assert int(step.seen) == 300 * 8
    assert any({"half", "learning_rate", "samples_per_second"} <= record.keys() for record in records)
    assert any("validation/loss" in record for record in records)


@pytest.mark.parametrize("weight_ema", [0.0, 0.9])
@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("kill_at", [1, 4, 7, 11])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, kill_at: int, weight_ema: float, keep_best: bool
) -> None:
    config = replace(CONFIG, weight_ema=weight_ema, keep_best=keep_best)
    whole, final = run(tmp_path / "whole", config)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config, kill_at=kill_at)
    again, final_again = run(tmp_path / "killed", config)
    assert final == final_again
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    def stable(folder: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (tmp_path / folder / METRICS_FILE).read_text().splitlines()]
        return [{key: value for key, value in record.items() if key != "samples_per_second"} for record in records]

    assert stable("whole") == stable("killed")


def test_micro_batches_add_up(tmp_path: Path) -> None:
    class Halves(Numbers):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in super().__iter__():
                yield {"x": batch["x"][:4]}
                yield {"x": batch["x"][4:]}

    def trained(stream: Numbers, config: FitConfig, folder: Path) -> LinearStep:
        folder.mkdir()
        step = LinearStep()
        step.dropout.p = 0.0
        fit(step, stream, validation, config, LocalContext(torch.device("cpu")), folder)
        return step

    whole = trained(Numbers(), CONFIG, tmp_path / "whole")
    halves = trained(Halves(), replace(CONFIG, accumulate=2), tmp_path / "halves")
    assert torch.allclose(whole.linear.weight, halves.linear.weight, atol=1e-6)
    assert int(whole.seen) == int(halves.seen) == 96


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Poisoned(Numbers):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for place, batch in enumerate(super().__iter__()):
                yield {"x": batch["x"] * float("nan")} if place == 6 else batch

    with pytest.raises(RunFailed, match="step 7"):
        fit(LinearStep(), Poisoned(), validation, CONFIG, LocalContext(torch.device("cpu")), tmp_path)
    assert (tmp_path / "resume.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.01),
        ("warmup_steps", 0),
        ("weight_decay", 0.5),
        ("clip_norm", 0.01),
        ("weight_ema", 0.9),
        ("seed", 1),
        ("steps", 6),
        ("precision", "bf16"),
    ],
)
def test_every_option_has_an_effect(tmp_path: Path, name: str, value: Any) -> None:
    plain, _ = run(tmp_path / "plain")
    other, _ = run(tmp_path / "other", replace(CONFIG, **{name: value}))
    assert not torch.equal(plain.linear.weight, other.linear.weight)


def test_keep_best_ends_with_the_best_evaluation(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=30, learning_rate=2.0, validate_every=1, warmup_steps=0, keep_best=True)
    _, final = run(tmp_path, config)
    losses = [
        json.loads(line)["validation/loss"]
        for line in (tmp_path / METRICS_FILE).read_text().splitlines()
        if "validation" in line
    ]
    assert final["loss"] == min(losses) < losses[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("validate_every", 0),
        ("save_every", 0),
        ("learning_rate", 0.0),
        ("weight_ema", 1.0),
        ("precision", "fp8"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "[-_]")):
        replace(CONFIG, **{name: value})


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    assert replace(CONFIG, accumulate=2).rank_batch(2) == 2
    with pytest.raises(UsageError, match="multiple of 3"):
        CONFIG.rank_batch(3)
