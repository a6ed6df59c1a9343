"""A step that is not finite stops the run, moves nothing, and leaves what is needed to find the cause."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.context import LocalContext
from pipelines.errors import Diverged
from pipelines.fit import FitConfig, fit
from vqmill.checkpoint import load_checkpoint
from vqmill.step import StepOutput

CONFIG = FitConfig(steps=8, batch_size=8, learning_rate=0.05, warmup_steps=0, accumulate=2, save_every=2)
BAD_STEP = 4


class Brightness(nn.Module):
    """Fits the mean of images, with dropout; its second weight has an infinite gradient where it is 0 and the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.root = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Mapping[str, Tensor]) -> StepOutput:
        pixels = batch["images"].float()
        loss = (nn.functional.dropout(pixels, 0.1, self.training).mean() - self.mean).square()
        if bool(batch["steep"].any()):
            loss = loss + self.root.sqrt()
        return StepOutput(loss, {"brightness": pixels.mean()})

    def update(self, *args: Any) -> dict[str, Tensor]:
        return {}

    def evaluate(self, batches: Any) -> dict[str, float]:
        return {"loss": 1.0}


class Images:
    """Float images; one of the step `BAD_STEP`, in its second micro-batch, has a bad pixel, or a steep place."""

    def __init__(self, pixel: float = 0.5, *, steep: bool = False) -> None:
        self.pixel, self.steep, self.place = pixel, steep, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(self.place))
            self.place += 1
            bad = self.place == 2 * BAD_STEP
            if bad:
                images[1, 0, 0, 0] = self.pixel
            yield {"images": images, "steep": torch.tensor([bad and self.steep] * 4)}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = state["place"]


def run(folder: Path, stream: Images, step: Brightness, seen: list[float]) -> None:
    def on_step(done: int, loss: float) -> None:
        seen.append(step.mean.item())

    fit(step, stream, lambda: [], CONFIG, LocalContext(torch.device("cpu")), folder, on_step)


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_the_batch_is_written_down(tmp_path: Path, pixel: float) -> None:
    step, seen = Brightness(), []
    with pytest.raises(
        Diverged, match=r"the loss is (nan|inf) at step 4 .* from rank 0.*nonfinite\.json, nonfinite\.safetensors"
    ) as failed:
        run(tmp_path, Images(pixel), step, seen)
    assert str(tmp_path) in str(failed.value)
    assert step.mean.item() == seen[-1], "no weight is touched by the bad step"
    assert (tmp_path / "resume.safetensors").exists()

    report = json.loads((tmp_path / "nonfinite.json").read_bytes())
    assert (report["step"], report["rank"], report["nonfinite_ranks"]) == (BAD_STEP, 0, [0])
    assert report["learning_rate"] == CONFIG.rate(BAD_STEP - 1)
    assert report["loss"] in ("nan", "inf")
    assert report["nonfinite_weights"] == []
    good, bad = report["micro_batches"]
    assert good["nonfinite_gradients"] == []
    assert isinstance(good["loss"], float)
    assert bad["nonfinite_gradients"] == ["mean"]
    assert bad["metrics"]["brightness"] in ("nan", "inf")
    assert (good["batch"]["images"]["nonfinite"], bad["batch"]["images"]["nonfinite"]) == (0, 1)
    assert bad["batch"]["images"]["shape"] == [4, 1, 8, 8]
    assert 0 <= bad["batch"]["images"]["min"] < bad["batch"]["images"]["mean"] < bad["batch"]["images"]["max"] <= 1

    tensors, metadata = load_checkpoint(tmp_path / "nonfinite.safetensors")
    assert metadata == {"step": BAD_STEP, "rank": 0}
    again = Images(pixel)
    again.load_state_dict(report["stream"])
    for micro, batch in zip(range(2), again, strict=False):
        assert torch.equal(batch["images"].nan_to_num(9), tensors[f"{micro}.images"].nan_to_num(9))
    with Image.open(tmp_path / "nonfinite.png") as picture:
        assert picture.size == (8 * 66 - 2, 64), "eight images of 8 pixels, enlarged eight times"


def test_a_gradient_stops_it_too(tmp_path: Path) -> None:
    step, seen = Brightness(), []
    with pytest.raises(Diverged, match="the gradient norm is inf at step 4"):
        run(tmp_path, Images(steep=True), step, seen)
    assert (step.mean.item(), step.root.item()) == (seen[-1], 0.0)
    report = json.loads((tmp_path / "nonfinite.json").read_bytes())
    assert isinstance(report["loss"], float)
    assert [micro["nonfinite_gradients"] for micro in report["micro_batches"]] == [[], ["root"]]


def test_a_loss_is_looked_at_as_it_was_drawn(tmp_path: Path) -> None:
    """Dropout is drawn again from the same seed: the losses of the report are those of the run."""
    with pytest.raises(Diverged):
        run(tmp_path, Images(steep=True), Brightness(), [])
    report = json.loads((tmp_path / "nonfinite.json").read_bytes())
    assert report["loss"] == pytest.approx(sum(micro["loss"] for micro in report["micro_batches"]) / 2, rel=1e-6)
