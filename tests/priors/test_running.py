"""Samplers: cached, naive and fixed-point give the same codes for the same noise."""

import pytest
import torch

from priors import LevelShape, from_preset, run, run_to_fixed_point, sample
from priors.level import inference
from priors.selecting import Drawing, clamped, gumbel_select
from vqmill.errors import CodesError

LEVELS = [LevelShape("top", 5, (3, 4)), LevelShape("bottom", 7, (6, 4))]
NETWORKS = {
    "plain": ("pixelcnn-tiny", {"norm": False, "vertical_residual": False, "position": False}),
    "first layer only": ("pixelcnn-tiny", {"num_layers": 0}),
    "no output blocks": ("pixelcnn-tiny", {"num_output_blocks": 0, "num_layers": 1}),
    "improved": ("pixelcnn-tiny", {}),
    "reach 2": ("pixelcnn-tiny", {"horizontal": 2, "vertical": 2}),
    "wide": ("pixelcnn-tiny", {"horizontal": 3, "vertical": 1}),
    "high": ("pixelcnn-tiny", {"horizontal": 1, "vertical": 4}),
    "attention": ("pixelcnn-tiny", {"attention_every": 2, "num_heads": 4}),
    "attention without norm": ("pixelcnn-tiny", {"attention_every": 1, "num_heads": 2, "norm": False}),
    "gpt": ("gpt-tiny", {}),
}
LABELS = torch.tensor([0, 2, -1, 1, 0])
UPPER = {"top": torch.arange(60).view(5, 3, 4) % 5}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def level_of(network, num_classes, name):
    """A level in float64 with weights far from 0, so that codes depend on each other, and its condition for five samples."""
    torch.manual_seed(0)
    preset, options = network
    prior = from_preset(preset, LEVELS, num_classes, "tok", depth=8, **options).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1.5)
    level = prior.level_prior(name)
    with inference(level):
        return level, level.condition(LABELS if num_classes else None, UPPER)


def drawn(level, condition, batch, sampler, first=0):
    """Codes, and the logits that they were chosen from: float64 [T, N, K]."""
    select, logits = gumbel_select(level, range(first, first + batch), 3, Drawing()), []

    def recorded(found, position):
        logits.append(found)
        return select(found, position)

    return run(level, batch, recorded, condition, sampler), torch.stack(logits)


@pytest.mark.parametrize("num_classes", [0, 3], ids=["no labels", "labels"])
@pytest.mark.parametrize("name", ["top", "bottom"])
def test_cached_equals_naive(network, num_classes, name):
    level, condition = level_of(network, num_classes, name)
    codes, logits = drawn(level, condition, 5, "cached")
    expected, reference = drawn(level, condition, 5, "naive")
    assert torch.equal(codes, expected)
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-9)
    assert logits[-1].std(dim=0).max() > 1e-3  # samples whose codes differ go on differently
    alone, own = drawn(level, None if condition is None else condition[2:3], 1, "cached", first=2)
    assert torch.equal(alone[0], codes[2])
    torch.testing.assert_close(own[:, 0], logits[:, 2], rtol=0, atol=1e-9)


def test_fixed_point_equals_naive(network):
    level, condition = level_of(network, 3, "bottom")
    select = gumbel_select(level, range(5), 3, Drawing())
    codes, passes = run_to_fixed_point(level, 5, select, condition)
    assert torch.equal(codes, run(level, 5, select, condition, "naive"))
    assert 2 <= passes <= 24


def test_a_session_makes_no_gradients_and_keeps_the_mode(toy):
    level = toy.train().level_prior("top")
    seen = []
    run(
        level,
        2,
        lambda logits, position: seen.append(logits) or logits.argmax(1),
        level.condition(torch.tensor([0, 1]), {}),
    )
    assert not any(logits.requires_grad for logits in seen)
    assert level.training


def test_clamped_places_keep_their_codes_and_move_the_others(toy):
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.mul_(2)  # so that codes depend on each other clearly
    level = toy.level_prior("bottom")
    with inference(level):
        condition = level.condition(torch.tensor([0, 1, 2]), {"top": torch.zeros(3, 2, 2, dtype=torch.int64)})
    select = gumbel_select(level, range(3), 3, Drawing())
    free = run(level, 3, select, condition)
    given = torch.full_like(free, -1)
    given[0, :2] = (free[0, :2] + 1) % 6  # one sample's first rows, and one place in another
    given[2, 1, 1] = (free[2, 1, 1] + 1) % 6
    kept = run(level, 3, clamped(select, given), condition)
    assert torch.equal(kept[given >= 0], given[given >= 0])
    assert torch.equal(kept[1], free[1])
    assert torch.equal(kept[2].flatten()[:5], free[2].flatten()[:5])
    assert not torch.equal(kept[0, 2:], free[0, 2:])  # after other rows


def test_other_samplers_are_refused(toy):
    with pytest.raises(CodesError, match="expected cached or naive, found 'naiv'"):
        sample(toy, 1, sampler="naiv")


@pytest.mark.parametrize("sampler", ["cached", "naive"])
def test_whole_samples_do_not_depend_on_the_sampler(toy, sampler):
    labels = torch.tensor([0, 1, 2, -1])
    found = sample(toy.double(), 4, labels, seed=5, sampler=sampler)
    expected = sample(toy, 4, labels, seed=5, batch_size=1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sampler", ["cached", "naive"])
def test_autocast_and_gradients_outside_change_nothing(network, sampler):
    level, condition = level_of(network, 3, "bottom")
    expected, _ = drawn(level, condition, 5, sampler)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        found, _ = drawn(level, condition, 5, sampler)
    assert torch.equal(found, expected)
    with torch.enable_grad():  # sessions write into buffers, which gradients do not pass
        level.session(5, condition).step(None)
