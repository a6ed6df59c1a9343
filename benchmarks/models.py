"""The tokenizer's inner loops, against oneDNN's matrix product and vector-quantize-pytorch. Generated data only."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

import tokenizer
from benchmarks.measure import Line, Target, again, compare, duration, medians
from benchmarks.resident import status_bytes
from pipelines.memory import keep_freed_memory
from tokenizer.search import nearest

# N, D, K; the bounds of: search time over that of the product alone, and speed over vector-quantize-pytorch
SHAPES = (((32_768, 64, 512), 1.55, 15), ((32_768, 64, 8192), 1.25, 35), ((8192, 512, 8192), 1.10, 8))
EXTRA_BYTES = 20 << 20


def search(folder: Path) -> Iterator[Line]:
    """Nearest codes, against the matrix product in them alone, by oneDNN and into memory that is there; and their memory."""
    keep_freed_memory()
    for shape, bound, _ in SHAPES:
        z, codebook = _vectors(shape)
        scores = torch.empty(shape[0], shape[2])
        found = medians(
            {
                "ours": lambda z=z, c=codebook: nearest(z, c),
                "product": lambda z=z, c=codebook, s=scores: _product(z, c, s),
            },
            clock=again,
        )
        title = f"nearest code, {_name(shape)}, time over that of oneDNN's product alone"
        ratio = found["ours"] / found["product"]
        yield Line(ratio, title, duration(found["ours"]), duration(found["product"]), Target(bound, at_most=True))
        del scores
        yield _memory(shape)


def quantizer(folder: Path) -> Iterator[Line]:
    """One training step of the quantizer alone, against vector-quantize-pytorch."""
    keep_freed_memory()
    for shape, _, bound in SHAPES:
        num_vectors, code_dim, codebook_size = shape
        z = torch.randn(num_vectors // 1024, code_dim, 32, 32, requires_grad=True)
        ours = tokenizer.EMAQuantizer(codebook_size, code_dim, tokenizer.Recipe(start_step=1))
        peer = VectorQuantize(
            dim=code_dim, codebook_size=codebook_size, decay=0.99, accept_image_fmap=True, threshold_ema_dead_code=1
        )
        generator = torch.Generator().manual_seed(0)

        def step(z: Tensor = z, ours: tokenizer.EMAQuantizer = ours, generator: torch.Generator = generator) -> None:
            found = ours.train()(z)
            (found.vectors.sum() + found.loss).backward()
            ours.update(found.counts, found.sums, found.pool, generator)

        def peer_step(z: Tensor = z, peer: VectorQuantize = peer) -> None:
            vectors, _, loss = peer.train()(z)
            (vectors.sum() + loss.sum()).backward()

        title = f"quantizer, forward + backward + update, {_name(shape)}, against vector-quantize-pytorch"
        yield compare(title, step, peer_step, bound)


def _vectors(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Vectors [N, D] and a codebook [K, D], normal."""
    generator = torch.Generator().manual_seed(0)
    num_vectors, code_dim, codebook_size = shape
    return torch.randn(num_vectors, code_dim, generator=generator), torch.randn(
        codebook_size, code_dim, generator=generator
    )


def _product(z: Tensor, codebook: Tensor, out: Tensor) -> None:
    """The product z C^T by oneDNN, which `medium` makes torch use. On CPUs with AMX that would be a product of bfloat16, and no fair peer."""
    torch.set_float32_matmul_precision("medium")
    try:
        torch.mm(z, codebook.T, out=out)
    finally:
        torch.set_float32_matmul_precision("highest")


def _memory(shape: tuple[int, int, int]) -> Line:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        extra = fresh.apply(_growth, (shape,))
    title = f"nearest code, {_name(shape)}, most memory above vectors, codebook and codes, over 20 MiB"
    target = Target(1, at_most=True)
    return Line(extra / EXTRA_BYTES, title, f"{extra / 2**20:.1f} MiB", f"{EXTRA_BYTES >> 20} MiB", target)


def _growth(shape: tuple[int, int, int]) -> int:
    """Bytes that a search adds to this process at most; a small one before has loaded what is loaded once. Linux only."""
    z, codebook = _vectors(shape)
    nearest(z[:8, :8].contiguous(), codebook[:8, :8].contiguous())
    before = status_bytes("VmRSS")
    codes = nearest(z, codebook)
    return max(0, status_bytes("VmHWM") - before - codes.nbytes)


def _name(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]:,} x {shape[1]}, K = {shape[2]:,}"
