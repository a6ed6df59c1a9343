"""Training steps of a tokenizer: our loop from tar shards, against the loop that one would write first. Generated scenes only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tokenizer
from benchmarks.measure import Line, medians, speed
from pipelines.context import LocalContext
from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.holdout import holdout_batches
from pipelines.corpus.images import Augmentation, Preprocessing
from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.corpus.samples import read_samples
from pipelines.corpus.stream import TrainingStream
from pipelines.fit import FitConfig, fit
from pipelines.memory import keep_freed_memory
from pipelines.scenes import write_corpus

IMAGES, SIDE = 4096, 32
SKIPPED, STEPS = 4, 16  # of each run: not counted, counted
FIT = FitConfig(steps=SKIPPED + STEPS, batch_size=64, learning_rate=1e-3, warmup_steps=0)
HIDDEN, RESIDUAL, CODEBOOK, WIDTH = 128, 32, 512, 64  # as in zalandoresearch's notebook


def training(folder: Path) -> Iterator[Line]:
    """Training steps from tar shards, against a plain loop over decoded images with a one-hot quantizer."""
    keep_freed_memory()
    write_corpus(folder / "scenes", num_images=IMAGES, num_shards=2, side=SIDE)
    plan = plan_corpus(str(folder / "scenes"))
    ours, plain = _our_loop(plan, folder), _plain_loop(plan)
    found = medians({"ours": ours, "plain": plain}, clock=lambda run: run())
    title = f"a training step, {FIT.batch_size} x 3 x {SIDE} x {SIDE}, one level, from tars, against a plain loop over images in memory"
    yield speed(title, found["ours"], found["plain"], 1.3)


def _our_loop(plan: Plan, folder: Path) -> Callable[[], float]:
    """Runs `fit` as the command does, from a new model each time; gives seconds a step, codebooks at work."""
    preprocessing, device = Preprocessing(size=SIDE, channels=3), torch.device("cpu")
    options = {"num_levels": 1, "hidden_dim": HIDDEN, "residual_dim": RESIDUAL, "codebook_size": CODEBOOK}
    config = tokenizer.preset_config("rgb32", **options, code_dim=WIDTH, start_step=1)

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
    """The notebook's loop: NCHW, a DataLoader with its defaults over images that are decoded already, and Adam."""
    preprocessing = Preprocessing(size=SIDE, channels=3)
    pixels = [decode_sample(sample, preprocessing).pixels for shard in plan.shards for sample in read_samples(shard)]
    images = torch.stack([torch.from_numpy(image) for image in pixels]).float() / 255 - 0.5
    variance = images.var()
    loader = DataLoader(TensorDataset(images), batch_size=FIT.batch_size, shuffle=True)

    def run() -> float:
        model = PlainVQVAE().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=FIT.learning_rate)
        batches = chain.from_iterable(repeat(loader))
        times: list[float] = []
        for _ in range(FIT.steps):
            (batch,) = next(batches)
            optimizer.zero_grad()
            reconstruction, commitment = model(batch)
            loss = F.mse_loss(reconstruction, batch) / variance + commitment
            loss.backward()
            optimizer.step()
            loss.item()  # notebooks print it, and ours checks it at each step
            times.append(time.perf_counter())
        return _seconds_a_step(times)

    return run


def _seconds_a_step(times: list[float]) -> float:
    return (times[-1] - times[SKIPPED - 1]) / STEPS


class PlainQuantizer(nn.Module):
    """Codebooks by moving averages over one-hot matrices, as in zalandoresearch/pytorch-vq-vae's notebook (`VectorQuantizerEMA`)."""

    counts: Tensor

    def __init__(self, codebook_size: int, code_dim: int, decay: float = 0.99, commitment_cost: float = 0.25) -> None:
        super().__init__()
        self.decay, self.commitment_cost = decay, commitment_cost
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim), requires_grad=False)
        self.sums = nn.Parameter(torch.randn(codebook_size, code_dim), requires_grad=False)
        self.register_buffer("counts", torch.zeros(codebook_size))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D, h, w] -> their entries, and the commitment loss."""
        z = z.permute(0, 2, 3, 1).contiguous()
        rows = z.view(-1, z.shape[-1])
        distances = rows.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * rows @ self.codebook.t()
        codes = distances.argmin(1, keepdim=True)
        one_hot = torch.zeros(len(codes), len(self.codebook)).scatter_(1, codes, 1)
        vectors = (one_hot @ self.codebook).view(z.shape)
        with torch.no_grad():
            self.counts.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + 1e-5) / (total + len(self.codebook) * 1e-5) * total
            self.sums.mul_(self.decay).add_(one_hot.t() @ rows.detach(), alpha=1 - self.decay)
        loss = self.commitment_cost * F.mse_loss(vectors.detach(), z)
        vectors = (z + (vectors - z).detach()).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            self.codebook.copy_(self.sums / smoothed[:, None])
        return vectors, loss


class PlainBlock(nn.Module):
    """The notebook's residual block."""

    def __init__(self) -> None:
        super().__init__()
        wide = nn.Conv2d(HIDDEN, RESIDUAL, 3, padding=1, bias=False)
        self.layers = nn.Sequential(nn.ReLU(), wide, nn.ReLU(), nn.Conv2d(RESIDUAL, HIDDEN, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features of the same shape."""
        return x + self.layers(x)


class PlainVQVAE(nn.Module):
    """The notebook's network, of the same sizes as ours."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, HIDDEN // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(HIDDEN // 2, HIDDEN, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(HIDDEN, HIDDEN, 3, 1, 1), PlainBlock(), PlainBlock(), nn.ReLU(), nn.Conv2d(HIDDEN, WIDTH, 1),
        )  # fmt: skip
        self.quantizer = PlainQuantizer(CODEBOOK, WIDTH)
        self.decoder = nn.Sequential(
            nn.Conv2d(WIDTH, HIDDEN, 3, 1, 1), PlainBlock(), PlainBlock(), nn.ReLU(),
            nn.ConvTranspose2d(HIDDEN, HIDDEN // 2, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(HIDDEN // 2, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-0.5, 0.5] -> reconstructions, and the commitment loss."""
        vectors, loss = self.quantizer(self.encoder(images))
        return self.decoder(vectors), loss
