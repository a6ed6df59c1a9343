"""Runs a training job in this process, or on Ray Train with several workers; the same loop, the same files, either way."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines.cluster import ray_cluster
from pipelines.context import Context, LocalContext, RankContext
from pipelines.errors import RunFailed
from pipelines.fit import METRICS_FILE, RESUME_FILE, Batch, FitConfig, Stream, fit
from pipelines.progress import meter
from pipelines.results import plain_console
from vqmill.checkpoint import load_checkpoint, save_checkpoint
from vqmill.files import write_whole

FINAL_FILE = "final.safetensors"
POLL_SECONDS = 0.5
TAIL_BYTES = 8192  # of the metrics file, which holds some lines of every kind


@dataclass(frozen=True)
class Task:
    """What one rank trains: a step, its share of the batches, and where held-out batches come from."""

    step: nn.Module
    stream: Stream
    validation: Callable[[], Iterable[Batch]]


class Job(Protocol):
    """A description of a training run that can be sent to another machine."""

    @property
    def fit(self) -> FitConfig:
        """How to optimise."""
        ...

    def build(self, rank: int, world_size: int) -> Task:
        """Opens the data and makes the model, the same on every rank."""
        ...

    def quarantined(self, stream: Stream) -> dict[str, dict[str, str]]:
        """What this rank set aside so far: by key, `reason` and `detail`."""
        ...


@dataclass(frozen=True)
class Trained:
    """A finished run: the step's tensors, its final evaluation, and what was set aside."""

    tensors: dict[str, Tensor]
    evaluation: dict[str, float]
    quarantined: dict[str, dict[str, str]]


def run_job(job: Job, folder: Path, *, workers: int, device: str, title: str) -> Trained:
    """Trains, or goes on where an earlier run in the same folder stopped.

    Args:
        job: what to train.
        folder: for metrics, resume point and result; on a disk that all workers share.
        workers: 1 runs in this process; more run as ranks of a Ray Train job, one device each.
        device: `cpu` or `cuda`.
        title: for the progress display.

    Raises:
        UsageError: the batch cannot be shared out among the workers.
        RunFailed: the loss was not finite, or a worker failed.
    """
    job.fit.rank_batch(workers)
    if not (folder / FINAL_FILE).exists():
        if (folder / RESUME_FILE).exists():
            plain_console(stderr=True).print(f"{title}: going on from the resume point of an earlier run")
        with meter(title, "steps") as show:
            if workers == 1:

                def on_step(done: int, loss: float) -> None:
                    show(done, job.fit.steps, f"loss {loss:.4f}")

                _run_rank(job, LocalContext(torch.device(device)), folder, on_step)
            else:
                with _following(
                    folder / METRICS_FILE, lambda step, loss: show(step, job.fit.steps, f"loss {loss:.4f}")
                ):
                    _run_on_ray(job, folder, workers, device)
    tensors, metadata = load_checkpoint(folder / FINAL_FILE)
    quarantined: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("quarantined-*.json")):
        quarantined |= json.loads(path.read_bytes())
    return Trained(tensors, metadata["evaluation"], dict(sorted(quarantined.items())))


def _run_rank(job: Job, context: Context, folder: Path, on_step: Callable[[int, float], None] | None = None) -> None:
    task = job.build(context.rank, context.world_size)
    record = folder / f"quarantined-{context.rank:05d}.json"
    before: dict[str, dict[str, str]] = json.loads(record.read_bytes()) if record.exists() else {}

    def after_step(done: int, loss: float) -> None:
        if done % job.fit.save_every == 0 or done == job.fit.steps:
            everything = before | job.quarantined(task.stream)
            write_whole(record, json.dumps(everything, ensure_ascii=False, indent=1).encode())
        if on_step:
            on_step(done, loss)

    step = task.step.to(context.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - faster convolutions, on CPUs too
    evaluation = fit(step, task.stream, task.validation, job.fit, context, folder, after_step)
    if context.rank == 0:
        save_checkpoint(folder / FINAL_FILE, step.state_dict(), {"evaluation": evaluation})


def _run_on_ray(job: Job, folder: Path, workers: int, device: str) -> None:
    with ray_cluster(workers, device):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            _ray_rank,
            train_loop_config={"job": job, "folder": folder.absolute()},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=device.startswith("cuda"), resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(
                name="train",
                storage_path=str((folder / "ray").absolute()),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise RunFailed(
                f"a training worker failed: {error}\nRun the same command again to go on from the last resume point."
            ) from error


def _ray_rank(config: dict[str, Any]) -> None:
    """One rank, in a process of Ray Train's."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))
    context = RankContext(ray.train.torch.get_device(), ray.train.report)
    _run_rank(config["job"], context, config["folder"])


@contextmanager
def _following(path: Path, callback: Callable[[int, float], None]) -> Iterator[None]:
    """Calls back with (step, loss) as lines appear in a metrics file that another process writes."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            if newest := _newest_step(path):
                callback(newest["step"], newest["loss"])

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _newest_step(path: Path) -> dict[str, Any] | None:
    """The last whole line about a training step near the end of a metrics file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    # The first piece may begin, and the last may end, in the middle of a line.
    steps = [record for line in lines[:-1] if line.startswith(b"{") and "learning_rate" in (record := json.loads(line))]
    return steps[-1] if steps else None
