"""The one training loop: runs any step object, alone or as a rank, and resumes where it was stopped.

A step (`tokenizer.TokenizerStep`, `priors.PriorStep`) is an nn.Module whose forward pass returns a `vqmill.step.StepOutput` and moves
nothing; `update` moves its codebooks after the optimizer. Everything random is drawn from (seed, step, rank), so that a resumed run
repeats an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines.context import Context
from pipelines.interrupts import PatientInterrupt
from pipelines.nonfinite import BadStep, report_bad_step
from pipelines.training_log import TrainingLog
from pipelines.training_state import TrainingState, to_device
from vqmill.errors import UsageError
from vqmill.step import StepOutput

LOG_EVERY_STEPS = 10
EARLY_SHARE = 10  # the first evaluation comes after this part of `validate_every`

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
        weight_ema: decay of a running average of the weights that is evaluated and kept; 0 for none. A codebook of quantizer `ema` is no
            weight: it follows the features by its own average (`ema_decay`) and is taken as it is (averaging it again measured worse).
        accumulate: micro-batches of a step.
        precision: `fp32`, or `bf16` autocast. `auto` is resolved once, where the command is given and before the run begins: `bf16` where the
            device computes it in hardware, probed. A run goes on with what it was begun with.
        validate_every: steps between evaluations; the first comes after a tenth of them (counted from the start of the codebooks).
        save_every: steps between resume points. With one worker Ctrl-C makes one more, after the step in hand (pressed again it stops at
            once); with more workers a run goes on from the last one.
        keep_best: end with the weights of the best evaluation, not the last.
        patience: stop early after so many evaluations in a row without a better one; 0 for never. Needs keep_best.
        max_failures: how often Ray Train starts all workers again, from the last resume point, after one was lost; 0 for never.
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
    patience: int = 0
    max_failures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name.replace('_', '-')} must be a positive number, got {value}.")
        for name in ("warmup_steps", "weight_decay", "patience", "max_failures", "seed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--{name.replace('_', '-')} must not be negative, got {value}.")
        if not 0 <= self.weight_ema < 1:
            raise UsageError(f"weight_ema must be in [0, 1), got {self.weight_ema}.")
        if self.patience and not self.keep_best:
            raise UsageError("patience stops some evaluations after the best one: set keep_best = true in [fit] too.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"--precision must be auto, fp32 or bf16, got {self.precision!r}.")

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
    on_step: Callable[[int, float], None] | None = None, *, before_save: Callable[[], None] | None = None, codebooks_begin: int = 0,
    tensorboard: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Trains a step and leaves its final weights in it.

    Args:
        step: see the module's docstring; on the context's device.
        stream: this rank's training batches, of `config.rank_batch(world_size)` samples.
        validation: gives held-out batches, read on rank 0.
        config: how to optimise.
        context: rank, device and what ranks tell each other.
        folder: for `metrics.jsonl`, the notes, the resume point and the best weights; shared by all ranks.
        on_step: called on every rank after each step with (steps done, loss).
        before_save: called on every rank before a resume point is written, for what must not be lost with the steps before it.
        codebooks_begin: steps before the codebooks are there; no evaluation until then can be the best.
        tensorboard: a folder for TensorBoard's event files; None writes none.

    Returns:
        The final evaluation.

    Raises:
        Diverged: the loss or the gradient became NaN or infinite, on all ranks alike; the last resume point is kept, and
            `pipelines.nonfinite` has written down what the batch was.
        KeyboardInterrupt: Ctrl-C; alone, after the step in hand and with a resume point of it.
    """
    log = TrainingLog(folder, context.rank, config.batch_size, tensorboard)
    state = TrainingState(step, stream, config, context, folder, log, codebooks_begin)
    state.resume()
    module = context.wrap(step)
    batches = iter(stream)
    final: dict[str, float] = {}
    early = min(codebooks_begin + max(1, config.validate_every // EARLY_SHARE), config.steps)
    # Ranks cannot agree on a step to stop after: Ctrl-C reaches them at different ones, or only their driver.
    with PatientInterrupt(wanted=context.world_size == 1) as interrupt:
        while state.done < config.steps and not state.exhausted:
            loss, metrics = _train_one(state, module, batches)
            if on_step:
                on_step(state.done, loss)
            last = state.done == config.steps
            if state.done % LOG_EVERY_STEPS == 0 or last:
                figures = {name: float(value) for name, value in metrics.items()}
                log.training({"step": state.done, **figures, "learning_rate": config.rate(state.done - 1)})
            if state.done % config.validate_every == 0 or state.done == early or last:
                final = state.validate(validation, warn=state.done == early > codebooks_begin)
            stopping = interrupt.asked
            if state.done % config.save_every == 0 or last or stopping or state.exhausted:
                if before_save:
                    before_save()
                state.save()
                context.report({"step": state.done, "loss": loss, **final})
            if stopping:
                log.note(f"stopped at step {state.done}, of which there is a resume point")
                break
    final = state.conclude(validation, final)
    log.close()
    return final


def _train_one(state: TrainingState, module: nn.Module, batches: Iterator[Batch]) -> tuple[float, dict[str, Tensor]]:
    """One optimizer step: the loss over all ranks, and this rank's metrics."""
    config, context, step = state.config, state.context, state.step
    step.train()
    seed = _seed(config.seed, state.done, 1 + context.rank)
    rate = config.rate(state.done)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    place = state.stream.state_dict()
    seen = [_on_device(next(batches), context.device) for _ in range(config.accumulate)]
    outputs = _backward(seen, seed, module, config, context)
    losses = context.sum({"loss": torch.stack([output.loss.detach() for output in outputs]).mean()})
    loss = float(losses["loss"]) / context.world_size
    norm = float(nn.utils.clip_grad_norm_(state.trained, config.clip_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):  # equal on all ranks: all of them stop here
        report_bad_step(
            BadStep(state.done + 1, rate, loss, norm, seed, place, seen), step, config.precision, context, state.folder
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    sums = context.sum({name: sum_of(output.sums[name] for output in outputs) for name in outputs[0].sums})
    pools = context.gather({name: torch.cat([output.pools[name] for output in outputs]) for name in outputs[0].pools})
    generator = torch.Generator().manual_seed(_seed(config.seed, state.done, 0))
    replaced = step.update(sums, pools, generator)  # pyright: ignore[reportCallIssue]
    state.done += 1
    state.forget(replaced)
    state.average()
    names = outputs[0].metrics
    metrics = {name: torch.stack([output.metrics[name] for output in outputs]).mean() for name in names}
    return loss, {**metrics, "loss": torch.tensor(loss), "gradient_norm": torch.tensor(norm)}


def _backward(
    batches: list[Batch], seed: int, module: nn.Module, config: FitConfig, context: Context
) -> list[StepOutput]:
    """Adds up the gradients of the micro-batches; ranks exchange them in the last."""
    torch.manual_seed(seed)
    outputs = []
    for micro, batch in enumerate(batches):
        last = micro == config.accumulate - 1
        quiet = (
            nullcontext() if last or not isinstance(module, nn.parallel.DistributedDataParallel) else module.no_sync()
        )
        with quiet:
            with torch.autocast(context.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = module(batch)
            (output.loss / config.accumulate).backward()
        outputs.append(output)
    return outputs


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape.

    >>> sum_of([torch.tensor(1), torch.tensor(2)])
    tensor(3)
    """
    return torch.stack(list(values)).sum(dim=0)


def _seed(seed: int, step: int, stream: int) -> int:
    """One 63-bit seed out of three numbers, far from its neighbours' (splitmix64)."""
    mixed = 0
    for part in (seed, step, stream):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: to_device(values, device) for name, values in batch.items()}
