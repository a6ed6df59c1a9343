"""Training steps of a tokenizer: our loop from tar shards, against the loop that one would write first. Generated scenes only."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import tokenizer
from benchmarks.classic import ClassicVQVAE, classic_step, decoded_images, endless
from benchmarks.measure import Line, medians, speed
from pipelines.context import LocalContext
from pipelines.corpus.images import Augmentation, Preprocessing
from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.corpus.stream import TrainingStream
from pipelines.corpus.walk import holdout_batches
from pipelines.fit import FitConfig, fit
from pipelines.memory import keep_freed_memory
from pipelines.scenes import write_corpus
from pipelines.train import run_job
from pipelines.train_tokenizer import TokenizerJob
from pipelines.training_log import METRICS_FILE

IMAGES, SIDE = 4096, 32
SKIPPED, STEPS = 4, 16  # of each run: not counted, counted
WORKER_STEPS = 100
FIT = FitConfig(steps=SKIPPED + STEPS, batch_size=64, learning_rate=1e-3, warmup_steps=0)


def training(folder: Path) -> Iterator[Line]:
    """Training steps from tar shards, against a plain loop over decoded images with a one-hot quantizer."""
    keep_freed_memory()
    write_corpus(folder / "scenes", num_images=IMAGES, num_shards=2, side=SIDE)
    plan = plan_corpus(str(folder / "scenes"))
    ours, plain = _our_loop(plan, folder), _plain_loop(plan)
    found = medians({"ours": ours, "plain": plain}, clock=lambda run: run())
    title = f"a training step, {FIT.batch_size} x 3 x {SIDE} x {SIDE}, one level, from tars, against a plain loop over images in memory"
    yield speed(title, found["ours"], found["plain"], 1.3)


def workers(folder: Path) -> Iterator[Line]:
    """Images a second of training on Ray with 1 and 2 workers of one thread each, data-parallel; as measured, without a target."""
    write_corpus(folder / "scenes", num_images=IMAGES, num_shards=2, side=SIDE)
    config = tokenizer.preset_config("sonnet_cifar", codebook_start="kmeans", start_step=1, revival="rare")
    fit_config = replace(FIT, steps=WORKER_STEPS, validate_every=WORKER_STEPS, save_every=WORKER_STEPS)
    job = TokenizerJob(
        plan_corpus(str(folder / "scenes")), config, fit_config, Augmentation(), holdout_fraction=0.02, num_threads=1
    )
    found = {}
    for number in (1, 2):
        place = folder / f"workers-{number}"
        place.mkdir()
        with threads(1):
            run_job(job, place, workers=number, device="cpu", title=f"{number} workers")
        records = [json.loads(line) for line in (place / METRICS_FILE).read_text().splitlines()]
        found[number] = 1 / statistics.median(
            record["samples_per_second"] for record in records if "samples_per_second" in record
        )
    yield speed(
        f"training, {FIT.batch_size} x 3 x {SIDE} x {SIDE} in all, an image, 2 workers against 1, a thread each",
        found[2],
        found[1],
    )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _our_loop(plan: Plan, folder: Path) -> Callable[[], float]:
    """Runs `fit` as the command does, from a new model each time; gives seconds a step, codebooks at work."""
    preprocessing, device = Preprocessing(size=SIDE, channels=3), torch.device("cpu")
    config = tokenizer.preset_config("sonnet_cifar", codebook_start="kmeans", start_step=1, revival="rare")

    def run() -> float:
        step = tokenizer.TokenizerStep(tokenizer.Tokenizer(config)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        stream = TrainingStream(plan, preprocessing, Augmentation(), FIT.batch_size, seed=0, holdout_fraction=0.02)
        times: list[float] = []
        place = folder / f"run-{time.monotonic_ns()}"  # a used folder would be resumed
        place.mkdir()
        fit_config = replace(FIT, validate_every=FIT.steps, save_every=FIT.steps)
        fit(
            step, stream, lambda: holdout_batches(plan, preprocessing, 0.02, FIT.batch_size, limit=FIT.batch_size),
            fit_config, LocalContext(device), place, lambda done, loss: times.append(time.perf_counter()),
        )  # fmt: skip
        stream.close()
        return _seconds_a_step(times)

    return run


def _plain_loop(plan: Plan) -> Callable[[], float]:
    """The loop of benchmarks/classic.py: NCHW, a DataLoader with its defaults over images that are decoded already, and Adam."""
    images = decoded_images(plan.corpus, SIDE)
    variance = float((images.float() / 127.5 - 1).var())
    loader = DataLoader(TensorDataset(images), batch_size=FIT.batch_size, shuffle=True, drop_last=True)

    def run() -> float:
        model = ClassicVQVAE().train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=FIT.learning_rate)
        batches = endless(loader)
        times: list[float] = []
        for _ in range(FIT.steps):
            classic_step(model, optimizer, next(batches).float() / 127.5 - 1, variance)
            times.append(time.perf_counter())
        return _seconds_a_step(times)

    return run


def _seconds_a_step(times: list[float]) -> float:
    return (times[-1] - times[SKIPPED - 1]) / STEPS
