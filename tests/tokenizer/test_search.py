"""Nearest-entry search against the naive matrix of distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenizer import search
from tokenizer.search import nearest


def naive(z: Tensor, codebook: Tensor) -> Tensor:
    return (z[:, None] - codebook[None]).square().sum(dim=2).argmin(dim=1)


@pytest.mark.parametrize(("vectors", "entries", "width"), [(1, 2, 1), (7, 3, 5), (1000, 256, 32), (513, 512, 64)])
def test_equals_the_naive_search(vectors, entries, width):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(vectors, width, generator=generator)
    codebook = torch.randn(entries, width, generator=generator)
    assert torch.equal(nearest(z, codebook), naive(z, codebook))


@pytest.mark.parametrize("vectors", [0, 1, 15, 16, 17, 31, 32, 33])
def test_every_row_of_every_block_is_searched(monkeypatch, vectors):
    monkeypatch.setattr(search, "BLOCK_SCORES", 16 * 8)  # 16 rows a block
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(
        -3, 4, (vectors, 4), generator=generator
    ).float()  # whole numbers: all sums are exact, ties are common
    codebook = torch.randint(-3, 4, (8, 4), generator=generator).float()
    assert torch.equal(nearest(z, codebook), naive(z, codebook))


def test_a_block_holds_at_least_one_row(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_SCORES", 1)
    z = torch.tensor([[0.2], [1.9], [0.8]])
    assert nearest(z, torch.tensor([[0.0], [1.0], [2.0]])).tolist() == [0, 2, 1]


def test_lowest_index_wins_ties():
    codebook = torch.tensor([[5.0], [1.0], [1.0], [-1.0], [1.0]])
    assert nearest(torch.tensor([[1.0], [0.0], [2.0]]), codebook).tolist() == [1, 1, 1]
    generator = torch.Generator().manual_seed(2)
    z = torch.randint(-1, 2, (500, 3), generator=generator).float()
    codebook = torch.randint(-1, 2, (40, 3), generator=generator).float()  # 27 places for 40 entries
    assert torch.equal(nearest(z, codebook), naive(z, codebook))
