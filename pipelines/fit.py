"""The one training loop: runs any step object, alone or as a rank, and resumes where it was stopped.

A step (`tokenizer.TokenizerStep`, `priors.PriorStep`) is an nn.Module whose forward pass returns a `vqmill.step.StepOutput` and moves
nothing; `update` moves its codebooks after the optimizer. Everything random is drawn from (seed, step, rank), so that a resumed run
repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines.context import Context
from pipelines.errors import RunFailed
from vqmill.checkpoint import load_checkpoint, save_checkpoint
from vqmill.errors import UsageError
from vqmill.files import write_whole

RESUME_FILE = "resume.safetensors"
BEST_FILE = "best.safetensors"
METRICS_FILE = "metrics.jsonl"
LOG_EVERY_STEPS = 10

Batch = dict[str, Tensor]


class Stream(Protocol):
    """Training batches without end, at a place that can be saved."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from here on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place, JSON-able; one rank's will do for all when their number has changed."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a place."""
        ...


@dataclass(frozen=True)
class FitConfig:
    """How to optimise.

    Attributes:
        steps: optimizer steps.
        batch_size: samples of a step over all ranks and micro-batches.
        learning_rate: at its peak; AdamW.
        warmup_steps: length of the linear rise before the cosine fall to 0.
        weight_decay: AdamW's, on tensors of two or more dimensions.
        clip_norm: the gradient's largest norm.
        weight_ema: decay of a running average of the weights that is evaluated and kept; 0 for none.
        accumulate: micro-batches of a step.
        precision: `fp32`, or `bf16` autocast.
        validate_every: steps between evaluations.
        save_every: steps between resume points.
        keep_best: end with the weights of the best evaluation, not the last.
        seed: of everything random.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    weight_ema: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"
    validate_every: int = 500
    save_every: int = 100
    keep_best: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name.replace('_', '-')} must be a positive number, got {value}.")
        for name in ("warmup_steps", "weight_decay", "seed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--{name.replace('_', '-')} must not be negative, got {value}.")
        if not 0 <= self.weight_ema < 1:
            raise UsageError(f"weight_ema must be in [0, 1), got {self.weight_ema}.")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"--precision must be fp32 or bf16, got {self.precision!r}.")

    def rank_batch(self, world_size: int) -> int:
        """Samples of one micro-batch on one rank.

        Raises:
            UsageError: the batch cannot be shared out equally.
        """
        if world_size < 1:
            raise UsageError(f"--workers must be at least 1, got {world_size}.")
        size, rest = divmod(self.batch_size, world_size * self.accumulate)
        if rest or size < 1:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be shared out equally over {world_size} workers and {self.accumulate} "
                f"micro-batches. Take a multiple of {world_size * self.accumulate}."
            )
        return size

    def rate(self, step: int) -> float:
        """The learning rate of a step (0-based): linear warm-up, then half a cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def fit(
    step: nn.Module, stream: Stream, validation: Callable[[], Iterable[Batch]], config: FitConfig, context: Context, folder: Path,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Trains a step and leaves its final weights in it.

    Args:
        step: see the module's docstring; on the context's device.
        stream: this rank's training batches, of `config.rank_batch(world_size)` samples.
        validation: gives held-out batches, read on rank 0.
        config: how to optimise.
        context: rank, device and what ranks tell each other.
        folder: for `metrics.jsonl` and the resume point; shared by all ranks.
        on_step: called on every rank after each step with (steps done, loss).

    Returns:
        The final evaluation.

    Raises:
        RunFailed: the loss became NaN or infinite; the last resume point is kept.
    """
    state = _State(step, stream, config, context, folder)
    state.resume()
    module = context.wrap(step)
    batches = iter(stream)
    final: dict[str, float] = {}
    while state.done < config.steps:
        loss, metrics = _train_one(state, module, batches)
        if on_step:
            on_step(state.done, loss)
        last = state.done == config.steps
        if state.done % LOG_EVERY_STEPS == 0 or last:
            state.log({"step": state.done, **metrics, "learning_rate": config.rate(state.done - 1)})
        if state.done % config.validate_every == 0 or last:
            final = state.validate(validation)
        if state.done % config.save_every == 0 or last:
            state.save()
            context.report({"step": state.done, "loss": loss, **final})
    return state.conclude(validation, final)


def _train_one(state: _State, module: nn.Module, batches: Iterator[Batch]) -> tuple[float, dict[str, float]]:
    """One optimizer step."""
    config, context, step = state.config, state.context, state.step
    step.train()
    torch.manual_seed(_seed(config.seed, state.done, 1 + context.rank))
    rate = config.rate(state.done)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    outputs = []
    for micro in range(config.accumulate):
        batch = {name: _to_device(values, context.device) for name, values in next(batches).items()}
        last = micro == config.accumulate - 1
        quiet = (
            nullcontext() if last or not isinstance(module, nn.parallel.DistributedDataParallel) else module.no_sync()
        )
        with quiet:
            with torch.autocast(context.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = module(batch)
            (output.loss / config.accumulate).backward()
        outputs.append(output)
    losses = context.sum({"loss": torch.stack([output.loss.detach() for output in outputs]).mean()})
    loss = float(losses["loss"]) / context.world_size
    if not math.isfinite(loss):
        raise RunFailed(
            f"the loss is {loss} at step {state.done + 1} (learning rate {rate:.3g}). The last resume point is kept in {state.folder}. "
            "Use a smaller --learning-rate, or --precision fp32, with another --out."
        )
    nn.utils.clip_grad_norm_(state.trained, config.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    sums = context.sum({name: sum_of(output.sums[name] for output in outputs) for name in outputs[0].sums})
    pools = context.gather({name: torch.cat([output.pools[name] for output in outputs]) for name in outputs[0].pools})
    step.update(sums, pools, torch.Generator().manual_seed(_seed(config.seed, state.done, 0)))  # pyright: ignore[reportCallIssue]
    state.done += 1
    state.average()
    metrics = {
        name: float(torch.stack([output.metrics[name] for output in outputs]).mean()) for name in outputs[0].metrics
    }
    return loss, {**metrics, "loss": loss}


class _State:
    """What a run carries from step to step, and how it is saved."""

    def __init__(self, step: nn.Module, stream: Stream, config: FitConfig, context: Context, folder: Path) -> None:
        self.step, self.stream, self.config, self.context, self.folder = step, stream, config, context, folder
        self.trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.done = 0
        self.best = math.inf
        self.ema = [parameter.detach().clone() for parameter in self.trained] if config.weight_ema else []
        self._clock = time.monotonic()
        self._clock_step = 0

    def average(self) -> None:
        """Moves the running average; it follows closely in the beginning, when the weights still run away."""
        if self.ema:
            decay = min(self.config.weight_ema, self.done / (self.done + 10))
            for average, parameter in zip(self.ema, self.trained, strict=True):
                average.lerp_(parameter.detach(), 1 - decay)

    def swap(self) -> None:
        """Exchanges the weights with their average."""
        for parameter, average in zip(self.trained, self.ema, strict=bool(self.ema)):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def validate(self, validation: Callable[[], Iterable[Batch]]) -> dict[str, float]:
        """Evaluates on rank 0; keeps the best weights when asked to."""
        if self.context.rank:
            return {}
        self.swap()
        found = self._evaluate(validation)
        if self.config.keep_best and found["loss"] < self.best:
            self.best = found["loss"]
            save_checkpoint(self.folder / BEST_FILE, self.step.state_dict(), {"step": self.done})
        self.swap()
        self.log({"step": self.done, **{f"validation/{name}": value for name, value in found.items()}})
        return found

    def conclude(self, validation: Callable[[], Iterable[Batch]], final: dict[str, float]) -> dict[str, float]:
        """Leaves the final weights in the step: the best ones, the average, or the last."""
        best = self.folder / BEST_FILE
        if self.config.keep_best and best.exists():
            self.step.load_state_dict(load_checkpoint(best)[0])
            return self._evaluate(validation) if self.context.rank == 0 else {}
        self.swap()
        if not final and self.context.rank == 0:  # resumed after its last step
            final = self._evaluate(validation)
        return final

    def _evaluate(self, validation: Callable[[], Iterable[Batch]]) -> dict[str, float]:
        return self.step.evaluate(_on_device(validation(), self.context.device))  # pyright: ignore[reportCallIssue]

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl, on rank 0."""
        if self.context.rank:
            return
        if "learning_rate" in record:
            now = time.monotonic()
            speed = (self.done - self._clock_step) * self.config.batch_size / max(now - self._clock, 1e-9)
            record = {**record, "samples_per_second": speed}
            self._clock, self._clock_step = now, self.done
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self) -> None:
        """Writes the resume point, on rank 0, with the place of every rank's stream."""
        streams = self.context.collect(self.stream.state_dict())
        if self.context.rank:
            return
        tensors = {f"step.{name}": value for name, value in self.step.state_dict().items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(self.ema)}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        best = self.best if math.isfinite(self.best) else None
        save_checkpoint(self.folder / RESUME_FILE, tensors, {"done": self.done, "best": best, "streams": streams})

    def resume(self) -> None:
        """Goes on from the resume point, if there is one."""
        path = self.folder / RESUME_FILE
        if path.exists():
            tensors, metadata = load_checkpoint(path)
            self.step.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("step.")})
            optimizer = self.optimizer.state_dict()
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, index, entry = name.split(".")
                    optimizer["state"].setdefault(int(index), {})[entry] = value
            self.optimizer.load_state_dict(optimizer)
            for index, average in enumerate(self.ema):
                average.copy_(tensors[f"ema.{index}"])
            self.done = self._clock_step = int(metadata["done"])
            self.best = math.inf if metadata["best"] is None else float(metadata["best"])
            streams = metadata["streams"]  # ranks stand apart after samples that could not be read
            mine = self.context.rank if len(streams) == self.context.world_size else 0
            self.stream.load_state_dict(streams[mine])
        if self.context.rank == 0:
            _forget_after(self.folder / METRICS_FILE, self.done)


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape.

    >>> sum_of([torch.tensor(1), torch.tensor(2)])
    tensor(3)
    """
    return torch.stack(list(values)).sum(dim=0)


def _forget_after(path: Path, step: int) -> None:
    """Drops the log lines of steps that will be done again."""
    if path.exists():
        whole = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
        lines = [line for line in whole.splitlines() if json.loads(line)["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in lines).encode())


def _seed(seed: int, step: int, stream: int) -> int:
    """One 63-bit seed out of three numbers, far from its neighbours' (splitmix64)."""
    mixed = 0
    for part in (seed, step, stream):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        yield {name: _to_device(values, device) for name, values in batch.items()}
