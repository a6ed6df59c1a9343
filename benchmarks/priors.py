"""Priors: samplers against each other and against one forward pass, and training from a store against training from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import priors
from benchmarks.measure import Line, Target, duration, medians, speed
from benchmarks.stores import draw_codes, store_spec, write_store
from pipelines.memory import keep_freed_memory
from pipelines.train_prior import CodeStream
from priors.level import LevelPrior, inference
from priors.running import NaiveSession
from vqmill import open_codes
from vqmill.spec import LevelSpec

GRID, CODEBOOK_SIZE = (32, 32), 512
# Batch size, threads (None: all), and the speed over the naive sampler that we aim at; counting operations allows 1,024.
CASES = ((1, None, 200.0), (1, 1, 200.0), (16, None, 650.0), (64, None, 750.0))
POOL_BYTES = 1 << 20
NAIVE_POSITIONS = 3  # timed; all positions cost the naive sampler the same


def sampling(folder: Path) -> Iterator[Line]:
    """The cached sampler against the naive one and one forward pass: 15 layers, 128 channels, 32 x 32 codes of 512."""
    keep_freed_memory()
    level = _level("pixelcnn", depth=128, num_layers=14, horizontal=2, vertical=2)
    name = "15 layers of 128 channels, 32 x 32 codes"
    all_threads = torch.get_num_threads()
    for size, threads, target in CASES:
        torch.set_num_threads(threads or all_threads)
        batch = f"batch {size}, {torch.get_num_threads()} thread(s)"
        codes = torch.randint(0, CODEBOOK_SIZE, (size, *GRID), generator=torch.Generator().manual_seed(0))
        found = medians(
            {
                "cached": lambda size=size: priors.run(level, size, _likeliest, None),
                "forward": lambda codes=codes: _forward(level, codes),
                "naive": lambda size=size: _naive_positions(level, size),
            },
            repeats=3,
        )
        naive = found["naive"] / NAIVE_POSITIONS * GRID[0] * GRID[1]
        yield speed(
            f"cached sampling, {name}, {batch}, against the naive sampler (extrapolated)",
            found["cached"],
            naive,
            target,
        )
        yield Line(
            found["cached"] / found["forward"], f"cached sampling, {batch}, time over that of one forward pass",
            duration(found["cached"]), duration(found["forward"]), Target(1.3, at_most=True) if size == 64 else None,
        )  # fmt: skip
    torch.set_num_threads(all_threads)
    gpt = _level("gpt")
    found = medians(
        {"gpt": lambda: priors.run(gpt, 16, _likeliest, None), "naive": lambda: _naive_positions(gpt, 16)}, repeats=3
    )
    naive = found["naive"] / NAIVE_POSITIONS * GRID[0] * GRID[1]
    yield speed(
        "preset gpt with its cache, 32 x 32 codes, batch 16, against itself without (extrapolated)", found["gpt"], naive
    )


def prior(folder: Path) -> Iterator[Line]:
    """Training steps of the preset pixelcnn from a store, against the same steps on a tensor in memory."""
    keep_freed_memory()
    grid, size, steps = LevelSpec("codes", CODEBOOK_SIZE, (8, 8)), 64, 60
    codes = draw_codes(20_000, grid)
    store = write_store(folder / "codes.zarr", store_spec((grid,)), {"codes": codes})
    shape = priors.LevelShape("codes", CODEBOOK_SIZE, (8, 8))
    whole = torch.from_numpy(codes.astype(np.int64))

    def from_store() -> Iterator[Tensor]:
        # Pools of a few hundred rows, so that the steps wait for reading and decoding as in a store larger than memory.
        batches = open_codes(store).batches(size, shuffle=True, seed=0, last="pad", pool_bytes=POOL_BYTES)
        return (batch["codes"] for batch in CodeStream(batches))

    def from_memory() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            for rows in torch.randperm(len(whole), generator=generator).split(size):
                yield whole[rows]

    def trained(batches: Callable[[], Iterator[Tensor]]) -> Callable[[], float]:
        def run() -> float:
            torch.manual_seed(0)
            step = priors.PriorStep(priors.from_preset("pixelcnn", [shape], 0, "none"), "codes").train()
            optimizer, source = torch.optim.AdamW(step.parameters()), batches()
            begun = time.perf_counter()
            for _ in range(steps):
                optimizer.zero_grad()
                step({"codes": next(source)}).loss.backward()
                optimizer.step()
            return (time.perf_counter() - begun) / steps

        return run

    found = medians({"store": trained(from_store), "memory": trained(from_memory)}, clock=lambda run: run())
    yield speed(
        "a training step of preset pixelcnn, 64 x 8 x 8 codes, from a store, against a tensor in memory",
        found["store"],
        found["memory"],
        0.97,
    )


def _level(preset: str, **sizes: int) -> LevelPrior:
    torch.manual_seed(0)
    shape = priors.LevelShape("codes", CODEBOOK_SIZE, GRID)
    return priors.from_preset(preset, [shape], 0, "none", **sizes).eval().level_prior("codes")


def _likeliest(logits: Tensor, position: int) -> Tensor:
    return logits.argmax(dim=1)


def _forward(level: LevelPrior, codes: Tensor) -> Tensor:
    with inference(level):
        return level(codes, None)


def _naive_positions(level: LevelPrior, batch_size: int) -> None:
    with inference(level):
        session, previous = NaiveSession(level, batch_size, None), None
        for position in range(NAIVE_POSITIONS):
            previous = _likeliest(session.step(previous), position)
