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
from pipelines.fit import FitConfig, fit
from pipelines.training_log import METRICS_FILE, NOTES_FILE
from pipelines.training_state import BEST_FILE, collapsed
from vqmill.checkpoint import load_checkpoint
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

    def update(
        self, sums: Mapping[str, Tensor], pools: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert len(pools["x"]) == int(sums["count"])
        self.seen += sums["count"]
        self.drawn += torch.rand((), generator=generator)
        return {}

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
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kill_at", [1, 4, 7, 11])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, kill_at: int, accumulate: int, weight_ema: float, keep_best: bool
) -> None:
    config = replace(CONFIG, weight_ema=weight_ema, keep_best=keep_best, accumulate=accumulate)
    whole, final = run(tmp_path / "whole", config, size=8 // accumulate)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config, kill_at=kill_at, size=8 // accumulate)
    again, final_again = run(tmp_path / "killed", config, size=8 // accumulate)
    assert final == final_again
    assert (tmp_path / "whole" / BEST_FILE).read_bytes() == (tmp_path / "killed" / BEST_FILE).read_bytes()
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


WILD = replace(CONFIG, steps=30, learning_rate=2.0, validate_every=1, warmup_steps=0)


def evaluations(folder: Path) -> dict[int, float]:
    """Loss by step."""
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return {record["step"]: record["validation/loss"] for record in records if "validation/loss" in record}


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("weight_ema", [0.0, 0.5])
def test_the_best_weights_are_kept_and_told_of(tmp_path: Path, keep_best: bool, weight_ema: float) -> None:
    step, final = run(tmp_path, replace(WILD, keep_best=keep_best, weight_ema=weight_ema))
    losses = evaluations(tmp_path)
    best = min(losses, key=losses.__getitem__)
    assert best < 30, "the case is one in which the best is not the last"
    assert final["loss"] == losses[best if keep_best else 30]
    tensors, metadata = load_checkpoint(tmp_path / BEST_FILE)
    assert metadata == {"step": best, "loss": losses[best]}
    assert all(torch.equal(value, step.state_dict()[name]) for name, value in tensors.items()) == keep_best
    step.load_state_dict(tensors)
    assert step.evaluate(validation())["loss"] == losses[best], "the weights that were evaluated: the averaged ones"
    said = (tmp_path / NOTES_FILE).read_text()
    assert f"at step {best}: loss {losses[best]:.4g}" in said
    assert ("the best is kept" in said, "the last is kept" in said) == (keep_best, not keep_best)


@pytest.mark.parametrize("kill_at", [None, 2, 3])
def test_a_run_that_gets_no_better_stops_early_with_its_best_weights(tmp_path: Path, kill_at: int | None) -> None:
    run(tmp_path / "whole", WILD)
    losses = evaluations(tmp_path / "whole")
    best, stop = 0, 0  # by hand: the first step after which three evaluations in a row were no better
    for number, loss in losses.items():
        if best == 0 or loss < losses[best]:
            best = number
        elif number - best == 3:
            stop = number
            break
    assert 3 < stop < 30
    patient = replace(WILD, keep_best=True, patience=3, save_every=2)
    if kill_at:
        with pytest.raises(Killed):
            run(tmp_path / "early", patient, kill_at=kill_at)
    _, final = run(tmp_path / "early", patient)
    assert list(evaluations(tmp_path / "early")) == list(range(1, stop + 1))
    assert final["loss"] == losses[best]
    said = (tmp_path / "early" / NOTES_FILE).read_text()
    assert f"stopped early at step {stop}: 3 evaluations in a row without a better one" in said
    _, again = run(tmp_path / "early", patient)
    assert again == final, "a finished run is not gone on with"
    with pytest.raises(UsageError, match="keep_best = true"):
        replace(CONFIG, patience=3)


def test_nothing_before_the_codebooks_begin_is_the_best(tmp_path: Path) -> None:
    fit(LinearStep(), Numbers(), validation, WILD, LocalContext(torch.device("cpu")), tmp_path, codebooks_begin=20)
    losses = evaluations(tmp_path)
    assert load_checkpoint(tmp_path / BEST_FILE)[1]["step"] == min(range(21, 31), key=losses.__getitem__)
    assert min(losses, key=losses.__getitem__) <= 20


@pytest.mark.parametrize(
    ("begin", "every", "steps", "expected"),
    [(0, 500, 60, [50, 60]), (30, 200, 60, [50, 60]), (0, 5, 12, [1, 5, 10, 12]), (100, 500, 60, [60])],
    ids=["a tenth", "after the codebooks", "short", "too short"],
)
def test_the_first_evaluation_comes_early(
    tmp_path: Path, begin: int, every: int, steps: int, expected: list[int]
) -> None:
    config = replace(CONFIG, steps=steps, validate_every=every)
    fit(LinearStep(), Numbers(), validation, config, LocalContext(torch.device("cpu")), tmp_path, codebooks_begin=begin)
    assert list(evaluations(tmp_path)) == expected


@pytest.mark.parametrize(("perplexity", "warned"), [(25.5, True), (25.7, False)], ids=["lost", "in use"])
def test_a_collapsed_codebook_is_told_once_and_early(tmp_path: Path, perplexity: float, warned: bool) -> None:
    class Quantized(LinearStep):
        def evaluate(self, batches: Any) -> dict[str, float]:
            return {"loss": 1.0, "top/perplexity": perplexity, "top/codebook_size": 512.0}

    fit(Quantized(), Numbers(), validation, CONFIG, LocalContext(torch.device("cpu")), tmp_path)
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    found = [record for record in records if "warning" in record]
    assert [record["step"] for record in found] == [1] * warned
    notes = tmp_path / NOTES_FILE
    assert (notes.exists() and "level top: the codebook has collapsed" in notes.read_text()) == warned


def test_each_stage_of_a_level_can_collapse() -> None:
    found = collapsed(
        {f"top/{stage}/perplexity": stage + 0.1 for stage in range(3)}
        | {f"top/{stage}/codebook_size": 20.0 for stage in range(3)}
    )
    assert [text.partition(":")[0] for text in found] == ["level top stage 1"]


def test_replaced_rows_are_forgotten(tmp_path: Path) -> None:
    class Revived(LinearStep):
        """A codebook whose row 1 is replaced after the third step."""

        def __init__(self) -> None:
            super().__init__()
            self.codebook = nn.Parameter(torch.ones(3, 2))
            self.idle = nn.Parameter(torch.ones(2, 2))  # never has a gradient
            self.updates = 0

        def forward(self, batch: Mapping[str, Tensor]) -> StepOutput:
            output = super().forward(batch)
            output.loss = output.loss + self.codebook.square().sum()
            return output

        @torch.no_grad()
        def update(self, *args: Any) -> dict[str, Tensor]:
            super().update(*args)
            self.updates += 1
            if self.updates < 3:
                return {}
            self.codebook[1] = 7.0
            return {"codebook": torch.tensor([False, True, False]), "idle": torch.tensor([True, False])}

    config = replace(CONFIG, steps=3, weight_ema=0.9)
    step = Revived()
    fit(step, Numbers(), validation, config, LocalContext(torch.device("cpu")), tmp_path)
    saved = load_checkpoint(tmp_path / "resume.safetensors")[0]
    codebook = {"exp_avg", "exp_avg_sq"}
    moments = {
        name.rpartition(".")[2]: value
        for name, value in saved.items()
        if value.shape == (3, 2) and name.rpartition(".")[2] in codebook
    }
    assert moments.keys() == codebook
    for values in moments.values():
        assert torch.equal(values != 0, torch.tensor([[True] * 2, [False] * 2, [True] * 2]))
    assert torch.equal(step.codebook[1], torch.full((2,), 7.0)), "the average starts again where the new entry is"
    assert not torch.equal(step.codebook[0], saved["step.codebook"][0]), "and goes on elsewhere"


def test_weights_are_averaged_and_codebooks_that_follow_by_themselves_are_not(tmp_path: Path) -> None:
    class Following(LinearStep):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codebook", torch.zeros(3, 2))

        def update(self, *args: Any) -> dict[str, Tensor]:
            self.codebook += 1
            return super().update(*args)

    step = Following()
    fit(step, Numbers(), validation, replace(CONFIG, weight_ema=0.9), LocalContext(torch.device("cpu")), tmp_path)
    live = load_checkpoint(tmp_path / "resume.safetensors")[0]
    assert not torch.equal(step.linear.weight, live["step.linear.weight"])
    assert torch.equal(step.codebook, torch.full((3, 2), 12.0))


@pytest.mark.parametrize("from_the_start", [True, False])
def test_tensorboard_has_the_same_points_once(tmp_path: Path, from_the_start: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(kill_at: int | None, *, tensorboard: bool) -> None:
        def on_step(done: int, loss: float) -> None:
            if done == kill_at:
                raise Killed

        config = replace(CONFIG, steps=30)
        context = LocalContext(torch.device("cpu"))
        fit(
            LinearStep(),
            Numbers(),
            validation,
            config,
            context,
            tmp_path,
            on_step,
            tensorboard=tmp_path / "events" if tensorboard else None,
        )

    with pytest.raises(Killed):
        train(kill_at=27, tensorboard=from_the_start)
    train(kill_at=None, tensorboard=True)
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("loss", "learning_rate", "validation/loss"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(record["step"], pytest.approx(record[name])) for record in records if name in record]
        assert points


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("validate_every", 0),
        ("save_every", 0),
        ("max_failures", -1),
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
