"""The tokenizer's inner loops, against PyTorch and vector-quantize-pytorch. Generated data only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from vector_quantize_pytorch import VectorQuantize

import tokenizer
from benchmarks.measure import Line, compare
from pipelines.memory import keep_freed_memory
from tokenizer.search import nearest


def search(folder: Path) -> Iterator[Line]:
    """Nearest codes of 65,536 vectors, against the distance matrix of torch.cdist."""
    keep_freed_memory()
    z, codebook = torch.randn(65_536, 64), torch.randn(512, 64)
    yield compare(
        "nearest code, 65,536 x 64, K = 512, against torch.cdist + argmin",
        lambda: nearest(z, codebook),
        lambda: torch.cdist(z, codebook).argmin(dim=1),
    )


def quantizer(folder: Path) -> Iterator[Line]:
    """One training step of the quantizer alone, against vector-quantize-pytorch."""
    keep_freed_memory()
    z = torch.randn(16, 64, 32, 32, requires_grad=True)
    ours = tokenizer.EMAQuantizer(512, 64, start_step=1)
    peer = VectorQuantize(dim=64, codebook_size=512, decay=0.99, accept_image_fmap=True, threshold_ema_dead_code=1)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        found = ours.train()(z)
        (found.vectors.sum() + found.loss).backward()
        ours.update(found.counts, found.sums, found.pool, generator)

    def peer_step() -> None:
        vectors, _, loss = peer.train()(z)
        (vectors.sum() + loss.sum()).backward()

    yield compare(
        "quantizer, forward + backward + update, 16 x 64 x 32 x 32, against vector-quantize-pytorch", step, peer_step
    )
