"""Finite scalar quantization: a bijection, all of it reachable, nothing to learn."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizer import FSQuantizer
from vqmill import CodesError

LEVELS = [(2,), (3, 3), (8, 5, 5, 5), (7, 4, 2, 3), (16, 15)]


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_codes_and_vectors_are_a_bijection(levels):
    quantizer, size = FSQuantizer(levels), math.prod(levels)
    codes = torch.arange(size).reshape(1, 1, size)
    vectors = quantizer.decode(codes)
    assert vectors.shape == (1, len(levels), 1, size)
    assert vectors.abs().max() <= 1
    assert vectors.min() == -1  # the lowest value of every dimension
    rows = vectors[0, :, 0].T
    assert len(rows.unique(dim=0)) == size
    for dimension, count in enumerate(levels):
        values = rows[:, dimension].unique()
        torch.testing.assert_close(values.diff(), torch.full((count - 1,), 1 / (count // 2)))
    torch.testing.assert_close(
        rows[1] - rows[0], torch.eye(len(levels))[0] / (levels[0] // 2)
    )  # the first is the lowest digit
    half = torch.tensor(levels).float() // 2
    inside = (rows * half + 0.5 * (torch.tensor(levels) % 2 == 0)) / ((torch.tensor(levels) - 1) / 2 + 1e-3)
    shift = torch.atanh((torch.tensor(levels) % 2 == 0) * 0.5 / ((torch.tensor(levels) - 1) / 2 + 1e-3))
    z = torch.atanh(inside) - shift  # what is squeezed into the vector itself
    assert torch.equal(quantizer.encode(z.T[None, :, None]), codes)


@pytest.mark.parametrize("levels", [*LEVELS, (1002, 3), (1023,), (1024,)], ids=str)
def test_features_at_both_ends_meet_the_first_and_the_last_code(levels):
    quantizer, size = FSQuantizer(levels), math.prod(levels)
    ends = torch.tensor([-1e4, 1e4]).expand(1, len(levels), 1, 2)
    assert quantizer.encode(ends).flatten().tolist() == [0, size - 1]


def test_all_codes_are_used_on_wide_features():
    quantizer = FSQuantizer((8, 5, 5, 5))
    z = 1.5 * torch.randn(50, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    out = quantizer(z)
    assert (out.counts > 0).all()
    assert out.counts.sum() == 50 * 40 * 40
    assert torch.equal(out.counts, torch.bincount(out.codes.flatten(), minlength=1000).float())


def test_the_gradient_is_that_of_the_squeezed_feature():
    quantizer = FSQuantizer((4, 5))
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.vectors, quantizer.decode(out.codes))
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(out.vectors, z, upstream)
    slopes = []
    for dimension, (count, shift) in enumerate(((4, math.atanh(0.5 / 1.501)), (5, 0.0))):
        half = (count - 1) / 2 + 1e-3
        slopes.append((1 - torch.tanh(z[:, dimension] + shift) ** 2) * half / (count // 2))
    torch.testing.assert_close(found, upstream * torch.stack(slopes, 1).detach())
    assert out.loss == 0


def test_forward_is_pure_and_in_float32():
    quantizer = FSQuantizer((8, 6))
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first = quantizer.train()(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = quantizer.eval()(z)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(quantizer.parameters())
    with pytest.raises(NotImplementedError, match="learns nothing"):
        quantizer.update(first.counts, first.sums, first.pool, torch.Generator())


def test_codes_keep_their_meaning_when_others_are_sorted():
    quantizer = FSQuantizer((3, 3))
    codes = torch.arange(9).reshape(1, 3, 3)
    before = quantizer.decode(codes)
    quantizer.sort_by_usage()
    assert torch.equal(quantizer.decode(codes), before)


def test_its_values_are_checked_by_the_configuration():
    from tokenizer import TokenizerConfig

    with pytest.raises(CodesError, match="fsq_levels"):
        TokenizerConfig(quantizer="fsq", fsq_levels=(2, 1025), codebook_size=2050, code_dim=2)


def test_codes_are_in_range_whatever_the_features_are():
    quantizer = FSQuantizer((8, 5, 3))
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])[:, None, None, None].expand(4, 3, 2, 2)
    codes = quantizer.encode(strange)
    assert codes.min() >= 0
    assert codes.max() < quantizer.codebook_size
    assert quantizer(strange).counts.sum() == codes.numel()
