"""The classic recipe, for comparison: a VQ-VAE trained the way that the notebooks everybody copies train it.

Plain PyTorch: a DataLoader over decoded images, NCHW, an eager model, one-hot codes, an EMA codebook of normal random numbers with smoothed
counts, Adam at a constant rate, pixels in [-1, 1], batches of 32 (the first version of zalandoresearch/pytorch-vq-vae's notebook, which took
its settings from sonnet's vqvae_example). It differs in two things: residual blocks have biases and a plain skip, as in sonnet, and Adam is
without amsgrad. Nothing of ours is in the loop.

    python -m benchmarks.classic "shards/train-{000000..000004}.tar" --validate shards/test-000000.tar --out runs/classic
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.samples import list_samples, load_sample

LOG_EVERY_STEPS = 10
VALIDATE_EVERY_STEPS = 500


class _Residual(nn.Module):
    def __init__(self, hidden: int, residual: int, bias: bool) -> None:
        super().__init__()
        self._block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(hidden, residual, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(residual, hidden, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self._block(x)


class _Stack(nn.Module):
    def __init__(self, hidden: int, residual: int, bias: bool) -> None:
        super().__init__()
        self._layers = nn.ModuleList([_Residual(hidden, residual, bias) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer(x)
        return F.relu(x)


class _Encoder(nn.Module):
    def __init__(self, channels: int, hidden: int, residual: int, bias: bool) -> None:
        super().__init__()
        self._conv_1 = nn.Conv2d(channels, hidden // 2, 4, stride=2, padding=1)
        self._conv_2 = nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1)
        self._conv_3 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self._residual_stack = _Stack(hidden, residual, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._residual_stack(self._conv_3(F.relu(self._conv_2(F.relu(self._conv_1(x))))))


class _Decoder(nn.Module):
    def __init__(self, depth: int, channels: int, hidden: int, residual: int, bias: bool) -> None:
        super().__init__()
        self._conv_1 = nn.Conv2d(depth, hidden, 3, padding=1)
        self._residual_stack = _Stack(hidden, residual, bias)
        self._conv_trans_1 = nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1)
        self._conv_trans_2 = nn.ConvTranspose2d(hidden // 2, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_trans_2(F.relu(self._conv_trans_1(self._residual_stack(self._conv_1(x)))))


class _OneHot(nn.Module):
    """Distances to all entries and a one-hot matrix; entries move by its column sums' moving averages, or by gradients from a uniform start."""

    _ema_cluster_size: Tensor

    def __init__(
        self, codebook_size: int, width: int, *, gradient: bool, decay: float = 0.99, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.gradient, self.decay, self.epsilon = gradient, decay, epsilon
        self._embedding = nn.Embedding(codebook_size, width)
        if gradient:
            self._embedding.weight.data.uniform_(-1 / codebook_size, 1 / codebook_size)
            return
        self._embedding.weight.data.normal_()
        self._embedding.weight.requires_grad_(False)
        self.register_buffer("_ema_cluster_size", torch.zeros(codebook_size))
        self._ema_w = nn.Parameter(torch.randn(codebook_size, width), requires_grad=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, D, h, w] -> their entries, the codebook's losses, and one-hot codes [N*h*w, K]."""
        last = z.permute(0, 2, 3, 1).contiguous()
        rows, table = last.view(-1, last.shape[-1]), self._embedding.weight
        distances = rows.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * rows @ table.T
        hot = torch.zeros(len(rows), len(table)).scatter_(1, distances.argmin(1, keepdim=True), 1)
        chosen = (hot @ table).view_as(last)
        loss = 0.25 * F.mse_loss(chosen.detach(), last)
        if self.gradient:
            loss = loss + F.mse_loss(chosen, last.detach())
        elif self.training:
            self._follow(hot, rows)
        return (last + (chosen - last).detach()).permute(0, 3, 1, 2).contiguous(), loss, hot

    @torch.no_grad()
    def _follow(self, hot: Tensor, rows: Tensor) -> None:
        size = self._ema_cluster_size * self.decay + (1 - self.decay) * hot.sum(0)
        total = size.sum()
        size = (size + self.epsilon) / (total + len(hot.T) * self.epsilon) * total
        self._ema_cluster_size.copy_(size)
        self._ema_w.mul_(self.decay).add_(hot.T @ rows, alpha=1 - self.decay)
        self._embedding.weight.copy_(self._ema_w / size[:, None])


class ClassicVQVAE(nn.Module):
    """Encoder, 1x1 convolution, codebook, decoder; the sizes of both notebooks unless others are given."""

    def __init__(
        self, channels: int = 3, hidden: int = 128, residual: int = 32, width: int = 64, codebook_size: int = 512, bias: bool = True,
        gradient: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._encoder = _Encoder(channels, hidden, residual, bias)
        self._pre_vq_conv = nn.Conv2d(hidden, width, 1)
        self._vq_vae = _OneHot(codebook_size, width, gradient=gradient)
        self._decoder = _Decoder(width, channels, hidden, residual, bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] -> reconstructions, the codebook's losses, one-hot codes."""
        vectors, loss, hot = self._vq_vae(self._pre_vq_conv(self._encoder(images)))
        return self._decoder(vectors), loss, hot


def classic_step(
    model: ClassicVQVAE, optimizer: torch.optim.Optimizer, images: Tensor, variance: float
) -> dict[str, float]:
    """One training step on images in [-1, 1]; gives `nmse` and the batch's perplexity."""
    optimizer.zero_grad()
    found, quantization, hot = model(images)
    error = F.mse_loss(found, images) / variance
    (error + quantization).backward()
    optimizer.step()
    return {"nmse": error.item(), "codes/batch_perplexity": _perplexity(hot.mean(0))}


def decoded_images(corpus: str, size: int, channels: int = 3) -> Tensor:
    """All images of a corpus, uint8 [N, C, size, size]."""
    preprocessing = Preprocessing(size=size, channels=channels)
    plan = plan_corpus(corpus)
    samples = (load_sample(shard, ref) for shard in plan.shards for ref in list_samples(shard) if ref.problem is None)
    return torch.stack([torch.from_numpy(decode_sample(sample, preprocessing).pixels) for sample in samples])


def _perplexity(share: Tensor) -> float:
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def _validate(model: ClassicVQVAE, images: Tensor) -> dict[str, float]:
    model.eval()
    error, uses = 0.0, torch.zeros(model._vq_vae._embedding.num_embeddings)
    for batch in (images.float() / 127.5 - 1).split(250):
        found, _, hot = model(batch)
        error += float((found.clamp(-1, 1) - batch).square().sum())
        uses += hot.sum(0)
    model.train()
    pixels = images.double() / 127.5 - 1
    nmse = error / images.numel() / float(pixels.var(unbiased=False))
    return {
        "validation/nmse": nmse,
        "validation/codes/used_codes": float((uses > 0).sum()),
        "validation/codes/perplexity": _perplexity(uses / uses.sum()),
    }


def main() -> None:
    """Trains, and writes metrics.jsonl as `vqmill train-tokenizer` does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classic", description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--validate", required=True, help="a corpus of images that are not trained on")
    parser.add_argument("--out", type=Path, required=True)
    for name, kind, default in (
        ("size", int, 32), ("channels", int, 3), ("steps", int, 10_000), ("batch-size", int, 32), ("learning-rate", float, 3e-4), ("seed", int, 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument(
        "--gradient", action="store_true", help="a codebook moved by gradients from a uniform start, not by averages"
    )
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    asked.out.mkdir(parents=True)
    images = decoded_images(asked.corpus, asked.size, asked.channels)
    held_out = decoded_images(asked.validate, asked.size, asked.channels)
    variance = float((images.double() / 127.5 - 1).var(unbiased=False))
    model = ClassicVQVAE(asked.channels, gradient=asked.gradient).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=asked.learning_rate)
    batches = endless(DataLoader(TensorDataset(images), batch_size=asked.batch_size, shuffle=True, drop_last=True))
    begun = time.monotonic()
    with (asked.out / "metrics.jsonl").open("w") as file:
        for step in range(1, asked.steps + 1):
            found = classic_step(model, optimizer, next(batches).float() / 127.5 - 1, variance)
            if step % LOG_EVERY_STEPS == 0:
                print(json.dumps({"step": step, **found}), file=file)
            if step % VALIDATE_EVERY_STEPS == 0 or step == asked.steps:
                report = {"step": step, "seconds": round(time.monotonic() - begun, 1), **_validate(model, held_out)}
                print(json.dumps(report), file=file, flush=True)
                print(report, flush=True)
                if not math.isfinite(report["validation/nmse"]):
                    raise SystemExit("the loss is not finite any more")


def endless(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """The images of a loader's batches, epoch after epoch."""
    while True:
        for (images,) in loader:
            yield images


if __name__ == "__main__":
    main()
