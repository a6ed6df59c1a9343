"""Sampling and exact likelihood through `run`."""

import itertools

import numpy as np
import pytest
import torch

from priors import Drawing, LevelShape, from_preset, run, sample, score
from priors.level import inference
from priors.selecting import gumbel_noise
from vqmill.errors import CodesError


def test_a_sample_does_not_depend_on_its_batch(toy):
    labels = torch.tensor([0, 1, 2, -1, 0, 1, 2])
    whole = sample(toy, 7, labels, seed=5, batch_size=7)
    split = sample(toy, 7, labels, seed=5, batch_size=2)
    fewer = sample(toy, 3, labels[:3], seed=5, batch_size=64)
    for name, grid in (("top", (2, 2)), ("bottom", (4, 4))):
        assert whole[name].dtype == torch.int64
        assert whole[name].shape == (7, *grid)
        assert torch.equal(whole[name], split[name])
        assert torch.equal(whole[name][:3], fewer[name])
    assert len(torch.unique(whole["bottom"].flatten(1), dim=0)) == 7


def test_seed_label_and_temperature_matter(toy):
    labels = torch.zeros(16, dtype=torch.int64)
    first = sample(toy, 16, labels, seed=1)["bottom"]
    assert not torch.equal(first, sample(toy, 16, labels, seed=2)["bottom"])
    assert not torch.equal(first, sample(toy, 16, labels + 1, seed=1)["bottom"])
    assert not torch.equal(first, sample(toy, 16, labels, seed=1, drawing=Drawing(temperature=0.3))["bottom"])
    coldest = sample(toy, 16, labels, seed=1, drawing=Drawing(temperature=0.0))["bottom"]
    assert len(torch.unique(coldest.flatten(1), dim=0)) == 1


def test_probabilities_of_all_grids_sum_to_one_and_agree_with_the_parallel_forward():
    torch.manual_seed(0)
    prior = from_preset("pixelcnn-tiny", [LevelShape("codes", 3, (2, 2))], 0, "tok", depth=8).double()
    level = prior.level_prior("codes")
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))  # [81, 4]
    total = torch.zeros(81, dtype=torch.float64)

    def known(logits, position):
        total.add_(logits.log_softmax(1).gather(1, grids[:, position, None])[:, 0])
        return grids[:, position]

    codes = run(level, 81, known, None)
    assert torch.equal(codes.flatten(1), grids)
    assert total.exp().sum().item() == pytest.approx(1, abs=1e-12)
    with inference(level):
        parallel = level(codes, None).log_softmax(1).gather(1, codes[:, None])[:, 0].sum((1, 2))
    torch.testing.assert_close(total, parallel, rtol=0, atol=1e-12)
    bits = score(prior, {"codes": codes})["codes"]
    torch.testing.assert_close(bits, -total / np.log(2), rtol=1e-5, atol=1e-5)


def test_samples_follow_the_model():
    torch.manual_seed(0)
    prior = from_preset("pixelcnn-tiny", [LevelShape("codes", 3, (1, 2))], 0, "tok", depth=8)
    drawn = sample(prior, 4000, seed=3, batch_size=4000)["codes"].flatten(1)
    grids = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, 1, 2)
    wanted = 2.0 ** -score(prior, {"codes": grids})["codes"]
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    spread = (4000 * wanted * (1 - wanted)).sqrt()
    assert ((counts - 4000 * wanted).abs() < 4 * spread).all()


def test_noise_is_gumbel_and_belongs_to_the_sample():
    noise = gumbel_noise(7, 0, 3, range(40), 500)
    assert torch.equal(noise[10:12], gumbel_noise(7, 0, 3, range(10, 12), 500))
    assert torch.equal(noise[:, :100], gumbel_noise(7, 0, 3, range(40), 100))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.08)
    others = [
        gumbel_noise(8, 0, 3, range(40), 500),
        gumbel_noise(7, 1, 3, range(40), 500),
        gumbel_noise(7, 0, 4, range(40), 500),
    ]
    assert not any(torch.isin(noise, other).float().mean() > 0.01 for other in others)


def test_sampling_leaves_mode_and_global_randomness_alone(toy):
    toy.train()
    before = torch.get_rng_state()
    seen = []
    sample(toy, 3, seed=0, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert all(module.training for module in toy.modules())
    assert torch.equal(before, torch.get_rng_state())
    assert seen[-1] == (60, 60)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"labels": torch.tensor([0, 3])}, r"expected 0\.\.2 .*found 3"),
        ({"labels": torch.tensor([-2, 0])}, "found -2"),
        ({"labels": torch.tensor([0])}, r"one class number for all, or 2 whole numbers, found \[1\]"),
        ({"labels": [1, 2, 0]}, r"one class number for all, or 2 whole numbers, found \[3\]"),
        ({"labels": torch.tensor([0.5, 1.0])}, r"whole numbers, found torch\.float32 \[2\]"),
        ({"labels": np.array([0.5, 1.0])}, r"whole numbers, found float64 \[2\]"),
        ({"labels": [[1], [1, 2]]}, "whole numbers, found"),
        ({"labels": "cat"}, "whole numbers, found <U3"),
        ({"labels": [True, False]}, "whole numbers, found bool"),
        ({"labels": [0, None]}, "whole numbers, found object"),
        ({"labels": 3}, r"expected 0\.\.2 .*found 3"),
        ({"labels": [0, 3]}, r"expected 0\.\.2 .*found 3"),
        ({"given": {"top": 3}}, r"expected whole numbers \[2, 2, 2\], found \[\]"),
    ],
)
def test_bad_arguments_are_refused(toy, arguments, message):
    with pytest.raises(CodesError, match=message):
        sample(toy, **({"num": 2} | arguments))


@pytest.mark.parametrize(
    "labels",
    [2, np.int64(2), torch.tensor(2), [2, 2, 2], (2, 2, 2), np.array([2, 2, 2], np.uint16), torch.tensor([2, 2, 2], dtype=torch.uint8)],
    ids=lambda value: f"{type(value).__name__}_{np.ndim(value)}",
)  # fmt: skip
def test_labels_may_come_as_any_kind_of_whole_numbers(toy, labels):
    expected = sample(toy, 3, torch.tensor([2, 2, 2]), seed=1, batch_size=2)
    found = sample(toy, 3, labels, seed=1, batch_size=2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(expected["bottom"], sample(toy, 3, seed=1)["bottom"])


def test_given_codes_may_come_as_an_array(toy):
    top = np.array([[[1, -1], [2, 0]]], np.int8)
    found = sample(toy, 1, 0, given={"top": top})["top"].numpy()
    assert (found[top >= 0] == [1, 2, 0]).all()


def test_labels_for_a_prior_without_labels_are_refused():
    prior = from_preset("pixelcnn-tiny", [LevelShape("codes", 3, (2, 2))], 0, "tok", depth=8)
    with pytest.raises(CodesError, match="without them"):
        sample(prior, 1, torch.tensor([0]))
