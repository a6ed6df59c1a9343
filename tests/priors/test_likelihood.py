"""Baselines against hand counts and known sources."""

import math

import numpy as np
import pytest
import torch

from priors import baselines, score
from vqmill.errors import CodesError


def test_uniform_codes_gain_nothing():
    codes = np.random.default_rng(0).integers(0, 8, (500, 6, 6)).astype(np.uint8)
    found = baselines(codes, 8)
    assert found.uniform == 3
    assert found.unigram == pytest.approx(3, abs=0.01)
    assert found.bigram == pytest.approx(3, abs=0.02)


def test_a_large_table_does_not_look_good_by_remembering():
    codes = np.random.default_rng(0).integers(0, 512, (50, 7, 7)).astype(np.uint16)  # 2,450 codes for 262,144 pairs
    found = baselines(codes, 512)
    assert found.unigram > 9
    assert found.bigram > 9


def test_the_bigram_sees_what_the_unigram_cannot():
    start = np.random.default_rng(0).integers(0, 8, (500, 1, 1))
    codes = (start + np.arange(6)[None, :, None] + np.arange(6)[None, None, :]) % 8
    found = baselines(codes, 8)
    assert found.unigram == pytest.approx(3, abs=0.01)
    assert found.bigram == pytest.approx(3 / 36, abs=0.02)  # three bits for the first of 36 codes, none for the others


def test_counts_of_training_codes_predict_others():
    train = np.array([[[0, 0], [0, 1]]])
    found = baselines(np.array([[[1, 2]]]), 4, train=train)
    assert found.unigram == pytest.approx(-(math.log2(1.5 / 6) + math.log2(0.5 / 6)) / 2)
    # After a 1 nothing was seen, so the 2 costs what the unigram says.
    assert found.bigram == pytest.approx(found.unigram)


def test_leave_one_out_matches_a_plain_loop():
    codes = np.random.default_rng(1).integers(0, 3, (2, 2, 3))
    flat = codes.reshape(-1)
    bits = [-math.log2((np.sum(np.delete(flat, i) == flat[i]) + 0.5) / (len(flat) - 1 + 1.5)) for i in range(len(flat))]
    assert baselines(codes, 3).unigram == pytest.approx(np.mean(bits))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_bigram_matches_a_plain_loop_in_every_dtype(dtype, held_out):
    generator = np.random.default_rng(2)
    codes, other = generator.integers(0, 250, (2, 5, 4, 3)).astype(dtype) // 60
    train = other if held_out else codes
    size, own = 5, 0 if held_out else 1

    def pairs(array):
        for grid in array.tolist():
            for y, row in enumerate(grid):
                for x, code in enumerate(row):
                    yield (row[x - 1] if x else grid[y - 1][0] if y else None), code

    known, bits = list(pairs(train)), []
    for before, code in pairs(codes):
        unigram = (sum(c == code for _, c in known) - own + 0.5) / (len(known) - own + 0.5 * size)
        if before is None:
            bits.append(-math.log2(unigram))
            continue
        seen = sum(pair == (before, code) for pair in known) - own
        context = sum(b == before for b, _ in known) - own
        bits.append(-math.log2((seen + math.sqrt(size) * unigram) / (context + math.sqrt(size))))
    found = baselines(codes, size, other if held_out else None)
    assert found.bigram == pytest.approx(np.mean(bits))


@pytest.mark.parametrize(
    "codes", [np.zeros((0, 2, 2), int), np.zeros((2, 2), int), np.full((1, 2, 2), 4), -np.ones((1, 2, 2), int)]
)
def test_bad_codes_are_refused(codes):
    with pytest.raises(CodesError, match="expected codes"):
        baselines(codes, 4)


@pytest.mark.parametrize("label", [-2, 3, 99])
def test_labels_that_are_no_class_are_refused(toy, toy_batch, label):
    with pytest.raises(CodesError, match=rf"expected 0\.\.2 \(or -1 for any class\), found {label}"):
        score(toy, toy_batch | {"label": torch.full((6,), label)})
