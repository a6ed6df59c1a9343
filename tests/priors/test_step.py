"""Training one level at a time: what is learned, what is drawn, what is left alone."""

import copy
import math

import pytest
import torch

from priors import LevelShape, PriorStep, from_preset, sample
from vqmill.errors import CodesError


def train(step, batch, num_steps, learning_rate=5e-3):
    optimizer = torch.optim.Adam(step.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        output = step(batch)
        output.loss.backward()
        optimizer.step()
        step.update(output.sums, output.pools, generator)
    return step.evaluate([batch])["bits_per_code"]


def test_a_tiny_set_is_learned_by_heart():
    torch.manual_seed(0)
    levels = [LevelShape("top", 16, (2, 2)), LevelShape("bottom", 32, (4, 4))]
    prior = from_preset("pixelcnn-tiny", levels, 0, "tok", depth=32)
    batch = {"top": torch.randint(0, 16, (8, 2, 2)), "bottom": torch.randint(0, 32, (8, 4, 4))}
    # Eight samples are three bits: the top needs 3 / 4 bits a code, and the bottom is then known.
    assert train(PriorStep(prior, "top"), batch, 80) < 0.85
    assert train(PriorStep(prior, "bottom"), batch, 80) < 0.1


def test_a_label_is_learned_and_so_is_its_absence():
    torch.manual_seed(0)
    prior = from_preset("pixelcnn-tiny", [LevelShape("codes", 8, (2, 2))], 4, "tok", depth=16, label_dropout=0.3)
    label = torch.arange(64) % 4
    batch = {"codes": (2 * label)[:, None, None].expand(64, 2, 2), "label": label}
    step = PriorStep(prior, "codes")
    assert train(step, batch, 80) < 0.05
    without = step.evaluate([batch | {"label": torch.full((64,), -1)}])["bits_per_code"]
    assert without == pytest.approx(2 / 4, abs=0.1)  # two bits for the class, in the first of four codes
    drawn = sample(prior, 40, torch.arange(40) % 4, seed=0)["codes"]
    assert (drawn == (2 * (torch.arange(40) % 4))[:, None, None]).float().mean() > 0.95


def test_only_its_level_is_trained(toy, toy_batch):
    step = PriorStep(toy, "bottom")
    before = copy.deepcopy(toy.state_dict())
    train(step, toy_batch, 2)
    changed = {name.split(".")[1] for name, tensor in toy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1"}
    assert {name.split(".")[0] for name in step.state_dict()} == {"level_prior"}


def test_forward_is_pure_and_draws_from_the_seeded_generator(toy_batch):
    torch.manual_seed(0)
    levels = [LevelShape("top", 5, (2, 2)), LevelShape("bottom", 6, (4, 4))]
    step = PriorStep(from_preset("pixelcnn-tiny", levels, 3, "tok", depth=8, dropout=0.5, label_dropout=0.5), "top")
    tensors = copy.deepcopy(step.state_dict())

    def loss_of(seed):
        torch.manual_seed(seed)
        return step(toy_batch).loss

    first = loss_of(1)
    assert torch.equal(first, loss_of(1))
    assert not torch.equal(first, loss_of(2))
    step.update({}, {}, torch.Generator())
    assert torch.equal(first, loss_of(1))
    assert step.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in step.state_dict().items())


def test_evaluation_weighs_codes_alike_and_moves_nothing(toy, toy_batch):
    step = PriorStep(toy, "bottom").train()
    before = copy.deepcopy(step.state_dict())
    whole = step.evaluate([toy_batch])
    parts = step.evaluate([{k: v[:1] for k, v in toy_batch.items()}, {k: v[1:] for k, v in toy_batch.items()}])
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-6)
    assert whole["bits_per_code"] == pytest.approx(whole["loss"] / math.log(2))
    assert step.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.state_dict().items())
    with pytest.raises(CodesError, match="at least one batch"):
        step.evaluate([])


def test_the_coarser_level_matters_and_must_be_given(toy, toy_batch):
    step = PriorStep(toy, "bottom").eval()
    other = toy_batch | {"top": (toy_batch["top"].long() + 1) % 5}
    assert not torch.equal(step(toy_batch).loss, step(other).loss)
    for name in ("top", "label", "bottom"):
        with pytest.raises(CodesError, match=f"lacks {name}"):
            step({key: value for key, value in toy_batch.items() if key != name})
    for label in (3, -2):  # neither may pass for another label
        with pytest.raises(CodesError, match=r"expected 0\.\.2"):
            step(toy_batch | {"label": torch.full((6,), label)})
    with pytest.raises(CodesError, match="conditioned on top"):
        toy.level_prior("bottom").condition(torch.tensor([0]), {})
    with pytest.raises(CodesError, match="expects labels"):
        toy.level_prior("top").condition(None, {})
