"""Runs a training job in this process, or on Ray Train with several workers; the same loop, the same files, either way."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from pipelines.errors import Diverged, RunFailed
from pipelines.fit import Batch, FitConfig, Stream, fit
from pipelines.precision import exact_float32
from pipelines.progress import Meter, meter
from pipelines.results import printable
from pipelines.training_log import METRICS_FILE, NOTES_FILE, newest_record
from pipelines.training_state import RESUME_FILE
from vqmill.checkpoint import load_checkpoint, save_checkpoint
from vqmill.errors import CodesError, UsageError
from vqmill.files import write_whole

FINAL_FILE = "final.safetensors"
ATTEMPTS_FILE = "attempts"  # a byte for each time that Ray started the ranks
STOPPED_FILES = "stopped-*.json"  # why a rank stopped, when starting it again would end the same way
FAILURES = {kind.__name__: kind for kind in (UsageError, CodesError, Diverged, RunFailed)}
POLL_SECONDS = 0.5
TAIL_BYTES = 8192  # of the metrics file, which holds some lines of every kind


@dataclass(frozen=True)
class Task:
    """What one rank trains: a step, its share of the batches, where held-out batches come from, and when its codebooks begin."""

    step: nn.Module
    stream: Stream
    validation: Callable[[], Iterable[Batch]]
    codebooks_begin: int = 0


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


def run_job(
    job: Job, folder: Path, *, workers: int, device: str, title: str, tensorboard: Path | None = None
) -> Trained:
    """Trains, or goes on where an earlier run in the same folder stopped.

    Args:
        job: what to train.
        folder: for metrics, notes, resume point and result; on a disk that all workers share.
        workers: 1 runs in this process; more run as ranks of a Ray Train job, one device each.
        device: `cpu` or `cuda`.
        title: for the progress display.
        tensorboard: a folder for TensorBoard's event files; None writes none.

    Raises:
        UsageError: the batch cannot be shared out among the workers.
        CodesError: the data cannot be read; on Ray too it is raised as it was, and not tried again.
        Diverged: the loss was not finite.
        RunFailed: workers failed more often than `max_failures`.
    """
    job.fit.rank_batch(workers)
    if not (folder / FINAL_FILE).exists():
        with meter(title, "steps") as show, _following(folder, show, job.fit.steps if workers > 1 else None):
            if (folder / RESUME_FILE).exists():
                show.say("going on from the resume point of an earlier run")
            if workers == 1:

                def on_step(done: int, loss: float) -> None:
                    show(done, job.fit.steps, f"loss {loss:.4f}")

                _run_rank(job, LocalContext(torch.device(device)), folder, tensorboard, on_step)
            else:
                _run_on_ray(job, folder, tensorboard, workers, device)
    tensors, metadata = load_checkpoint(folder / FINAL_FILE)
    quarantined: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("quarantined-*.json")):
        quarantined |= json.loads(path.read_bytes())
    return Trained(tensors, metadata["evaluation"], dict(sorted(quarantined.items())))


def _run_rank(
    job: Job, context: Context, folder: Path, tensorboard: Path | None, on_step: Callable[[int, float], None] | None = None
) -> None:  # fmt: skip
    task = job.build(context.rank, context.world_size)
    record = folder / f"quarantined-{context.rank:05d}.json"
    before: dict[str, dict[str, str]] = json.loads(record.read_bytes()) if record.exists() else {}

    def write_quarantined() -> None:
        everything = before | job.quarantined(task.stream)
        write_whole(record, json.dumps(everything, ensure_ascii=False, indent=1).encode())

    step = task.step.to(context.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - faster convolutions, on CPUs too
    evaluation = fit(
        step, task.stream, task.validation, job.fit, context, folder, on_step,
        before_save=write_quarantined, codebooks_begin=task.codebooks_begin, tensorboard=tensorboard,
    )  # fmt: skip
    if context.rank == 0:
        save_checkpoint(folder / FINAL_FILE, step.state_dict(), {"evaluation": evaluation})


def _run_on_ray(job: Job, folder: Path, tensorboard: Path | None, workers: int, device: str) -> None:
    shutil.rmtree(folder / "ray", ignore_errors=True)  # Ray Train would restore its state by itself; ours is enough
    for path in (folder / ATTEMPTS_FILE, *folder.glob(STOPPED_FILES)):
        path.unlink(missing_ok=True)
    with ray_cluster(workers, device):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            _ray_rank,
            train_loop_config={
                "job": job,
                "folder": folder.absolute(),
                "tensorboard": tensorboard and tensorboard.absolute(),
            },
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=device.startswith("cuda"), resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(
                name="train",
                storage_path=str((folder / "ray").absolute()),
                failure_config=FailureConfig(max_failures=job.fit.max_failures),
            ),
        )
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except SystemExit as stop:  # Ray Train's answer to Ctrl-C, which says nothing
            raise KeyboardInterrupt from stop
        except Exception as error:
            _raise_stopped(folder)
            raise RunFailed(
                f"a training worker failed, and max_failures in [fit] is {job.fit.max_failures}: {error}\n"
                "Run the same command again to go on from the last resume point."
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, ctrl_c)  # Ray Train leaves its own, which swallows it
        _raise_stopped(folder)


def _raise_stopped(folder: Path) -> None:
    """Raises what a rank stopped for, if one did."""
    for path in sorted(folder.glob(STOPPED_FILES)):
        found = json.loads(path.read_bytes())
        raise FAILURES[found["kind"]](found["message"])


def _ray_rank(config: dict[str, Any]) -> None:
    """One rank, in a process of Ray Train's, which starts all ranks again after any exception."""
    import ray.train
    import ray.train.torch

    job, folder = config["job"], config["folder"]
    exact_float32()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))
    context = RankContext(ray.train.torch.get_device(), ray.train.report)
    if context.rank == 0:
        with (folder / ATTEMPTS_FILE).open("ab") as file:
            context.restart = file.tell()
            file.write(b".")
    _unless_stopped(folder, context.rank, lambda: _run_rank(job, context, folder, config["tensorboard"]))


def _unless_stopped(folder: Path, rank: int, run: Callable[[], None]) -> None:
    """Runs a rank; writes down a failure that would come again, and does nothing when it is started again after one."""
    if any(folder.glob(STOPPED_FILES)):
        return  # the driver tells it
    try:
        run()
    except (RunFailed, CodesError) as error:
        kind = next(name for name, kind in FAILURES.items() if isinstance(error, kind))
        path = folder / STOPPED_FILES.replace("*", f"{rank:05d}")
        write_whole(path, json.dumps({"kind": kind, "message": str(error)}).encode())
        if isinstance(error, CodesError):
            raise  # the other ranks still wait for this one; Ray ends them
        # RunFailed is raised by all ranks together.


@contextmanager
def _following(folder: Path, show: Meter, steps: int | None) -> Iterator[None]:
    """Shows notes as they are written, by this or another process; and, when `steps` is given, how far the metrics file is."""
    notes, stop = folder / NOTES_FILE, threading.Event()
    shown = notes.stat().st_size if notes.exists() else 0

    def look() -> None:
        nonlocal shown
        if notes.exists():
            with notes.open("rb") as file:
                file.seek(shown)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                shown += len(whole) + 1
                for line in whole.decode().splitlines():
                    show.say(printable(line))
        if steps and (newest := newest_record(folder / METRICS_FILE, "learning_rate", TAIL_BYTES)):
            show(newest["step"], steps, f"loss {newest['loss']:.4f}")

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            look()

    thread = threading.Thread(target=follow, name="notes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
