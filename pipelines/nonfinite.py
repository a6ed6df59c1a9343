"""A training step whose loss or gradient is not finite: finds whose batch it was, writes it down, and stops all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pipelines.context import Context
from pipelines.errors import Diverged
from pipelines.pictures import good_scale, image_grid, save_picture
from tokenizer.losses import to_bytes
from vqmill.checkpoint import save_checkpoint
from vqmill.files import canonical_json, write_whole

BATCH_FILE = "nonfinite.safetensors"
REPORT_FILE = "nonfinite.json"
PICTURE_FILE = "nonfinite.png"
COLUMNS = 8


@dataclass(frozen=True)
class BadStep:
    """What one rank knows of the step, before any weight was moved by it.

    Attributes:
        number: of the step, from 1.
        learning_rate: it would have had.
        loss: over all ranks.
        gradient_norm: over all ranks, before clipping.
        seed: from which this rank drew dropout and the like.
        stream: the place of this rank's stream before the batch, from which it can be drawn again.
        batches: this rank's micro-batches.
    """

    number: int
    learning_rate: float
    loss: float
    gradient_norm: float
    seed: int
    stream: dict[str, Any]
    batches: list[dict[str, Tensor]]


def report_bad_step(bad: BadStep, step: nn.Module, precision: str, context: Context, folder: Path) -> NoReturn:
    """Writes `nonfinite.json`, `nonfinite.safetensors` and, of images, `nonfinite.png` into the run's folder; called by all ranks.

    Gradients have been averaged over ranks by now, so each rank computes its own once more, alone. The files are those of the
    first rank that finds anything; of rank 0 if none does (the sum over ranks was too large, or the device computes differently
    each time).

    Raises:
        Diverged: always.
    """
    micro = _look_again(bad, step, precision, context.device)
    guilty = [rank for rank, found in enumerate(context.collect(any(map(_is_bad, micro)))) if found]
    rank = guilty[0] if guilty else 0
    files = [REPORT_FILE, BATCH_FILE]
    images = bad.batches[0].get("images")
    if images is not None and images.ndim == 4:
        files.append(PICTURE_FILE)
    if context.rank == rank:
        tensors = {f"{index}.{name}": values for index, batch in enumerate(bad.batches) for name, values in batch.items()}  # fmt: skip
        save_checkpoint(folder / BATCH_FILE, tensors, {"step": bad.number, "rank": rank})
        if PICTURE_FILE in files:
            _draw(folder / PICTURE_FILE, torch.cat([batch["images"] for batch in bad.batches]), bad.number)
        report = {
            "step": bad.number,
            "rank": rank,
            "nonfinite_ranks": guilty,
            "learning_rate": bad.learning_rate,
            "precision": precision,
            "loss": bad.loss,
            "gradient_norm": bad.gradient_norm,
            "nonfinite_weights": [name for name, value in step.state_dict().items() if not _finite(value)],
            "micro_batches": micro,
            "seed": bad.seed,
            "stream": bad.stream,
        }
        write_whole(folder / REPORT_FILE, canonical_json(_jsonable(report)))
    context.collect(None)  # nobody leaves before the files are there
    what = "loss" if not math.isfinite(bad.loss) else "gradient norm"
    value = bad.loss if what == "loss" else bad.gradient_norm
    ranks = f"rank {', '.join(map(str, guilty))}" if guilty else "no rank alone"
    raise Diverged(
        f"the {what} is {value} at step {bad.number} (learning rate {bad.learning_rate:.3g}), from {ranks}. See in {folder}: "
        f"{', '.join(files)}, which say what was in the batch and which gradients broke. If the batch is at fault, mend or remove "
        "its samples; if not, use a smaller --learning-rate, or --precision fp32. Then train with another --out. No weight was "
        "touched by this step, and the last resume point, if one was reached, is kept there."
    )


def _look_again(bad: BadStep, step: nn.Module, precision: str, device: torch.device) -> list[dict[str, Any]]:
    """Each micro-batch by itself, on this rank alone: its loss, metrics, gradients and values."""
    torch.manual_seed(bad.seed)
    named = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    found = []
    for batch in bad.batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = step(batch)
        # Not backward(): that would exchange gradients with the other ranks.
        gradients = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True)
        pairs = [(name, gradient) for name, gradient in zip(named, gradients, strict=True) if gradient is not None]
        found.append(
            {
                "loss": float(output.loss.detach()),
                "metrics": {name: float(value) for name, value in output.metrics.items()},
                "gradient_norm": float(torch.stack([gradient.float().norm() for _, gradient in pairs]).norm()),
                "nonfinite_gradients": [name for name, gradient in pairs if not _finite(gradient)],
                "batch": {name: _describe(values) for name, values in batch.items()},
            }
        )
    return found


def _is_bad(micro: Mapping[str, Any]) -> bool:
    return not (math.isfinite(micro["loss"]) and math.isfinite(micro["gradient_norm"]))


def _describe(values: Tensor) -> dict[str, Any]:
    """Shape and range of a tensor; range and mean are of its finite values."""
    flat = values.detach().double().flatten()
    finite = flat[flat.isfinite()]
    described: dict[str, Any] = {
        "dtype": str(values.dtype).removeprefix("torch."),
        "shape": list(values.shape),
        "nonfinite": len(flat) - len(finite),
    }
    if len(finite):
        described |= {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean())}
    return described


def _draw(path: Path, images: Tensor, step: int) -> None:
    """The images [N, C, H, W], uint8 or float in [-1, 1] (what is not finite is black), eight in a row."""
    if images.is_floating_point():
        images = to_bytes(images.float().nan_to_num(-1, 1, -1).clamp(-1, 1))
    grid = image_grid(images.cpu().numpy(), COLUMNS, good_scale(images.shape[-1]))
    save_picture(path, grid, {"nonfinite_step": step})


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _jsonable(value: Any) -> Any:
    """The value with infinities and NaN as words: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
