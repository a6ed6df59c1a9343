"""What a training run carries from step to step: weights, optimizer, average, best evaluation; and how it is saved and found again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.context import Context
from pipelines.training_log import TrainingLog
from vqmill.checkpoint import load_checkpoint, save_checkpoint
from vqmill.usage import title

if TYPE_CHECKING:
    from pipelines.fit import Batch, FitConfig, Stream

RESUME_FILE = "resume.safetensors"
BEST_FILE = "best.safetensors"
COLLAPSED_SHARE = (
    0.05  # of a codebook: a perplexity below it, when it has just been made, means that most codes are lost
)


class TrainingState:
    """One rank's state; see `pipelines.fit.fit` for the arguments."""

    def __init__(
        self, step: nn.Module, stream: Stream, config: FitConfig, context: Context, folder: Path, log: TrainingLog, codebooks_begin: int
    ) -> None:  # fmt: skip
        self.step, self.stream, self.config, self.context, self.folder = step, stream, config, context, folder
        self.log, self.codebooks_begin = log, codebooks_begin
        self.trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
        decayed = {id(p) for name, p in step.named_parameters() if p.ndim >= 2 and not name.endswith("codebook")}
        groups = [
            {"params": [p for p in self.trained if id(p) in decayed], "weight_decay": config.weight_decay},
            {"params": [p for p in self.trained if id(p) not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.done = 0
        self.best, self.best_step = math.inf, 0
        self.stale = 0  # evaluations since the best one
        self.ema = [parameter.detach().clone() for parameter in self.trained] if config.weight_ema else []

    def average(self) -> None:
        """Moves the running average; it follows closely in the beginning, when the weights still run away."""
        if self.ema:
            decay = min(self.config.weight_ema, self.done / (self.done + 10))
            for average, parameter in zip(self.ema, self.trained, strict=True):
                average.lerp_(parameter.detach(), 1 - decay)

    def forget(self, replaced: Mapping[str, Tensor]) -> None:
        """Drops what the optimizer and the running average know of rows that `update` has replaced.

        Args:
            replaced: see `vqmill.step`: by name of a parameter of the step, bool [K] over its rows.
        """
        named = dict(self.step.named_parameters())
        averages = dict(zip(map(id, self.trained), self.ema, strict=bool(self.ema)))
        for name, rows in replaced.items():
            parameter = named[name]
            moments = self.optimizer.state.get(parameter, {})  # none: it never had a gradient
            for moment in moments.keys() & {"exp_avg", "exp_avg_sq"}:
                moments[moment][rows] = 0
            if self.ema:
                averages[id(parameter)][rows] = parameter.detach()[rows]

    def swap(self) -> None:
        """Exchanges the weights with their average."""
        for parameter, average in zip(self.trained, self.ema, strict=bool(self.ema)):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def validate(self, validation: Callable[[], Iterable[Batch]], *, warn: bool) -> dict[str, float]:
        """Evaluates on rank 0, with the averaged weights if there are any, and keeps the best; `warn` of lost codebooks."""
        found = {} if self.context.rank else self._judge(validation, warn=warn)
        if self.config.patience:
            counted = self.context.sum({"stale": torch.tensor(0.0 if self.context.rank else float(self.stale))})
            self.stale = int(counted["stale"])  # all ranks stop at one step
            if self.exhausted:
                self.log.note(
                    f"stopped early at step {self.done}: {self.stale} evaluations in a row without a better one"
                )
        return found

    def _judge(self, validation: Callable[[], Iterable[Batch]], *, warn: bool) -> dict[str, float]:
        self.swap()
        found = self._evaluate(validation)
        if self.done > self.codebooks_begin:
            self.stale += 1
            if found["loss"] < self.best:
                self.best, self.best_step, self.stale = found["loss"], self.done, 0
                save_checkpoint(
                    self.folder / BEST_FILE, self.step.state_dict(), {"step": self.best_step, "loss": self.best}
                )
        self.swap()
        self.log.record({"step": self.done, **{f"validation/{name}": value for name, value in found.items()}})
        for warning in collapsed(found) if warn else ():
            self.log.note(f"warning, step {self.done}: {warning}")
            self.log.record({"step": self.done, "warning": warning})
        return found

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as `patience` says were no better than one before them."""
        return 0 < self.config.patience <= self.stale

    def conclude(self, validation: Callable[[], Iterable[Batch]], final: dict[str, float]) -> dict[str, float]:
        """Leaves the final weights in the step: the best ones, the average, or the last. Says how far best and last are apart."""
        self.swap()
        if self.context.rank == 0:
            final = final or self._evaluate(validation)  # none yet: resumed after the last step
            self._compare(final["loss"])
        best = self.folder / BEST_FILE
        if self.config.keep_best and best.exists():
            self.step.load_state_dict(load_checkpoint(best)[0])
            return self._evaluate(validation) if self.context.rank == 0 else {}
        return final

    def _compare(self, last: float) -> None:
        if not self.best_step or self.best_step == self.done:
            return
        kept = (
            "the best is kept" if self.config.keep_best else "the last is kept (keep_best in [fit] would keep the best)"
        )
        self.log.note(
            f"the best evaluation was at step {self.best_step}: loss {self.best:.4g}, {last - self.best:.2g} below the last, {last:.4g}; {kept}"
        )

    def _evaluate(self, validation: Callable[[], Iterable[Batch]]) -> dict[str, float]:
        batches = (
            {name: to_device(values, self.context.device) for name, values in batch.items()} for batch in validation()
        )
        return self.step.evaluate(batches)  # pyright: ignore[reportCallIssue]

    def save(self) -> None:
        """Writes the resume point, on rank 0, with the place of every rank's stream."""
        streams = self.context.collect(self.stream.state_dict())
        if self.context.rank:
            return
        tensors = {f"step.{name}": value for name, value in self.step.state_dict().items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(self.ema)}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        self.log.flush()
        save_checkpoint(
            self.folder / RESUME_FILE, tensors, {"done": self.done, "streams": streams, "stale": self.stale}
        )

    def resume(self) -> None:
        """Goes on from the resume point, if there is one."""
        path = self.folder / RESUME_FILE
        streams = []
        if path.exists():
            tensors, metadata = load_checkpoint(path)
            self._load(tensors)
            self.done, self.stale, streams = int(metadata["done"]), int(metadata["stale"]), metadata["streams"]
            # Ranks stand apart after samples that could not be read.
            mine = self.context.rank if len(streams) == self.context.world_size else 0
            self.stream.load_state_dict(streams[mine])
        best = self.folder / BEST_FILE
        if best.exists():
            kept = load_checkpoint(best)[1]
            if int(kept["step"]) <= self.done:
                self.best, self.best_step = float(kept["loss"]), int(kept["step"])
            elif self.context.rank == 0:
                best.unlink()  # of steps that will be done again, and perhaps come out differently
        self.log.begin(self.done)
        if self.context.restart:
            self.log.note(
                f"a worker failed: all were started again from step {self.done} (restart {self.context.restart}; max_failures is {self.config.max_failures})"
            )
            self.log.record({"step": self.done, "restart": self.context.restart})
        if streams and len(streams) != self.context.world_size:
            self.log.note(
                f"going on from step {self.done} with another number of workers, {self.context.world_size} instead of {len(streams)}: "
                "the same batches, but sums in another order, so the result will not be the same to the bit"
            )

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        self.step.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("step.")})
        optimizer = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".")
                optimizer["state"].setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(optimizer)
        for index, average in enumerate(self.ema):
            average.copy_(tensors[f"ema.{index}"])


def collapsed(evaluation: Mapping[str, float]) -> list[str]:
    """What to say about codebooks that use next to none of their codes.

    >>> [text.split(":")[0] for text in collapsed({"top/perplexity": 3.0, "top/codebook_size": 512.0})]
    ['level top']

    Args:
        evaluation: with `{level}/perplexity` and `{level}/codebook_size` for each level; other entries are not looked at.
    """
    found = []
    for name, perplexity in evaluation.items():
        level, _, kind = name.rpartition("/")
        if kind == "perplexity" and perplexity < COLLAPSED_SHARE * (size := evaluation[f"{level}/codebook_size"]):
            found.append(
                f"{title(level)}: the codebook has collapsed, its perplexity is {perplexity:.1f} of {size:.0f} codes (expected at least "
                f'{COLLAPSED_SHARE:.0%}). Stop, and try a smaller --learning-rate, or codebook_start = "kmeans" and revival = "rare" in '
                "[tokenizer] where the preset has others (published ones begin at random and revive little, as their sources do); or a "
                "smaller codebook_size, if the images are all alike."
            )
    return found


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU without waiting."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
