"""Nearest-entry search against the naive matrix of distances."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer import search
from tokenizer.search import nearest

MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
CLEAR = 1e-4  # a difference of squared distances, of some tens, that float32 does not lose


def naive(z: Tensor, codebook: Tensor) -> Tensor:
    return (z[:, None] - codebook[None]).square().sum(dim=2).argmin(dim=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["interleaved", "in order"])
def layout(request, monkeypatch):
    """Both orders in which scores may lie."""
    if not request.param:
        monkeypatch.setattr(search, "INTERLEAVED_NUMBERS", 0)


@pytest.fixture(params=["as found", "without oneDNN"])
def products(request, monkeypatch):
    """Both ways to compute products; on machines without oneDNN they are one."""
    if request.param == "without oneDNN":
        monkeypatch.setattr(search, "_products", lambda: search._by_linear)


@pytest.mark.usefixtures("layout", "products")
@pytest.mark.parametrize(
    ("vectors", "entries", "width"),
    [(1, 1, 1), (1, 2, 1), (7, 3, 5), (100, 63, 4), (100, 129, 4), (1000, 256, 32), (513, 512, 64), (300, 1000, 16), (40, 5000, 8)],
)  # fmt: skip
def test_equals_the_naive_search(vectors, entries, width):
    z, codebook = normal(vectors, width), normal(entries, width, seed=1)
    distances = (z.double()[:, None] - codebook.double()[None]).square().sum(dim=2)
    best = distances.sort(dim=1)
    clear = best.values[:, min(1, entries - 1)] - best.values[:, 0] > CLEAR if entries > 1 else torch.ones(1) > 0
    assert clear.float().mean() > 0.9
    assert torch.equal(nearest(z, codebook)[clear], best.indices[:, 0][clear])


@pytest.mark.usefixtures("layout", "products")
@pytest.mark.parametrize("part", [1, 7, 64, 65])
def test_a_codebook_in_parts_is_searched_as_a_whole(monkeypatch, part):
    monkeypatch.setattr(search, "PART_NUMBERS", part * 3)
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(
        -3, 4, (300, 3), generator=generator
    ).float()  # whole numbers: all sums are exact, ties are common
    codebook = torch.randint(-3, 4, (130, 3), generator=generator).float()
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


@pytest.mark.usefixtures("layout", "products")
@pytest.mark.parametrize("entries", [40, 127, 640])
def test_lowest_index_wins_ties(entries):
    codebook = torch.tensor([[5.0], [1.0], [1.0], [-1.0], [1.0]])
    assert nearest(torch.tensor([[1.0], [0.0], [2.0]]), codebook).tolist() == [1, 1, 1]
    generator = torch.Generator().manual_seed(2)
    z = torch.randint(-1, 2, (500, 3), generator=generator).float()
    codebook = torch.randint(-1, 2, (entries, 3), generator=generator).float()  # 27 places for all entries
    assert torch.equal(nearest(z, codebook), naive(z, codebook))


@pytest.mark.usefixtures("layout", "products")
def test_codes_do_not_depend_on_the_batch():
    """All distances are equal but for rounding: entries hold the same numbers in other orders, vectors one number everywhere."""
    width = 64
    numbers = normal(width)
    orders = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(seed)) for seed in range(200)])
    codebook = numbers[orders]
    z = normal(1500, 1, seed=1).expand(-1, width)
    whole = nearest(z, codebook)
    assert len(whole.unique()) > 1  # rounding decides
    for size in (1, 2, 3, 7, 256):
        assert torch.equal(torch.cat([nearest(part, codebook) for part in z[:256].split(size)]), whole[:256])


@pytest.mark.usefixtures("layout")
def test_codes_of_numbers_that_are_none_are_in_range():
    z = torch.tensor([[torch.nan, 0.0], [torch.inf, 1.0], [-torch.inf, torch.inf], [1.0, 1.0]])
    codes = nearest(z, normal(67, 2))
    assert ((codes >= 0) & (codes < 67)).all()


def test_vectors_need_not_lie_row_by_row():
    z, codebook = normal(8, 300), normal(64, 8, seed=1)
    assert torch.equal(nearest(z.T, codebook), nearest(z.T.contiguous(), codebook))


def test_no_gradients_are_recorded():
    assert not nearest(normal(4, 3).requires_grad_(), normal(5, 3).requires_grad_()).requires_grad


@pytest.fixture(params=["legacy", "mkldnn.matmul", "mkldnn", "all"])
def reduced(request):
    """A caller who allows bfloat16 inside float32 products; gives what shall be found again."""
    settings = {"mkldnn.matmul": MATMUL, "mkldnn": torch.backends.mkldnn, "all": torch.backends}
    chosen = settings.get(request.param)
    if chosen is None:
        torch.set_float32_matmul_precision("medium")
    else:
        chosen.fp32_precision = "bf16"
    yield chosen
    if chosen is None:
        torch.set_float32_matmul_precision("highest")
    else:
        chosen.fp32_precision = "none"
    assert MATMUL.fp32_precision in ("none", "ieee")  # no setting of ours remains


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN has no such setting")
def test_products_are_exact_and_the_callers_setting_stays(monkeypatch, reduced):
    during = []

    def product(codebook: Tensor, bias: Tensor, rows: int) -> search.Scores:
        during.append(MATMUL.fp32_precision)
        return search._by_linear(codebook, bias, rows)

    monkeypatch.setattr(search, "_products", lambda: product)
    z, codebook = normal(50, 8), normal(64, 8, seed=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: nearest(z, codebook), range(32)))
    assert set(during) == {"ieee"}
    assert MATMUL.fp32_precision == "bf16"


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no such operation")
def test_onednn_is_used_where_it_is():
    search._products.cache_clear()
    assert search._products() is not search._by_linear


@pytest.mark.parametrize("fault", [RuntimeError("no such operation"), None], ids=["missing", "inexact"])
def test_a_product_that_fails_or_differs_is_not_used_and_that_is_said(monkeypatch, caplog, fault):
    class Operations:
        @staticmethod
        def _reorder_linear_weight(codebook: Tensor, rows: int) -> Tensor:
            return codebook

        @staticmethod
        def _linear_pointwise(x: Tensor, codebook: Tensor, bias: Tensor, *rest: object) -> Tensor:
            if fault:
                raise fault
            return F.linear(x, codebook, bias) + 1

    monkeypatch.setattr(torch.ops, "mkldnn", Operations, raising=False)
    search._products.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "tokenizer.search"):
            assert search._products() is search._by_linear
    finally:
        search._products.cache_clear()
    assert ("no such operation" if fault else "its results differ") in caplog.text
