"""What drawing options do to the probabilities that codes are drawn from."""

import pytest
import torch

from priors import Drawing, LevelShape, from_preset, sample, score
from priors.selecting import guided, gumbel_select
from tests.priors.conftest import make_toy
from vqmill.errors import CodesError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.0, -2.0])
NUM = 20_000


def frequencies(toy, drawing):
    """How often each of six codes is drawn from LOGITS."""
    select = gumbel_select(toy.level_prior("bottom"), range(NUM), 1, drawing)
    return torch.bincount(select(LOGITS.expand(NUM, -1), 0), minlength=6) / NUM


@pytest.mark.parametrize(
    ("drawing", "kept"),
    [
        (Drawing(), [0, 1, 2, 3, 4, 5]),
        (Drawing(temperature=0.5), [0, 1, 2, 3, 4, 5]),
        (Drawing(top_k=1), [0]),
        (Drawing(top_k=2), [0, 1, 4]),  # 1 and 4 are equally likely: both stay
        (Drawing(top_k=100), [0, 1, 2, 3, 4, 5]),
        (Drawing(top_p=0.1), [0]),
        (Drawing(top_p=0.6), [0, 1]),  # 0.50, 0.19, 0.19, ...: the first two reach 0.6; of equals the lower code comes first
        (Drawing(top_p=0.95), [0, 1, 2, 4]),
        (Drawing(temperature=0.25, top_p=0.95), [0]),  # the temperature comes first
        (Drawing(top_k=3, top_p=0.9), [0, 1, 4]),
        (Drawing(temperature=0), [0]),
        (Drawing(temperature=1e-40), [0]),
    ],
    ids=str,
)  # fmt: skip
def test_codes_are_drawn_as_often_as_they_should(toy, drawing, kept):
    logits = LOGITS / max(drawing.temperature, 0.01)
    expected = torch.full_like(logits, -torch.inf).index_put((torch.tensor(kept),), logits[kept]).softmax(0)
    assert (frequencies(toy, drawing) - expected).abs().max() < 0.02
    assert ((frequencies(toy, drawing) > 0) == (expected > 0)).all()


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_moves_away_from_the_model_without_a_label(guidance):
    labelled, free = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    seen = []

    def select(logits, position):
        seen.append(logits)
        return logits.argmax(1)

    codes = guided(select, guidance)(torch.cat([labelled, free]), 0)
    torch.testing.assert_close(seen[0], free + guidance * (labelled - free))
    assert codes.tolist() == [seen[0].argmax().item()] * 2  # both halves go on with the same code


def test_guidance_of_whole_samples():
    toy, labels = make_toy(label_dropout=0.1), torch.arange(60) % 3
    plain = sample(toy, 60, labels, seed=1)
    for scale, same in ((1.0, True), (0.0, False), (5.0, False)):
        found = sample(toy, 60, labels, seed=1, drawing=Drawing(guidance=scale))
        assert torch.equal(found["bottom"], plain["bottom"]) == same
    free = sample(toy, 60, seed=1)
    without = sample(toy, 60, labels, seed=1, drawing=Drawing(guidance=0.0))
    assert all(torch.equal(free[name], without[name]) for name in free)


def test_the_candidate_that_its_label_explains_best_is_kept():
    toy, labels = make_toy(label_dropout=0.1), torch.arange(30) % 3

    def evidence(codes):
        with_label, without = (score(toy, codes | {"label": label}) for label in (labels, torch.full_like(labels, -1)))
        return sum(without[name] - with_label[name] for name in without)

    plain = sample(toy, 30, labels, seed=1)
    best = sample(toy, 30, labels, seed=1, drawing=Drawing(candidates=6))
    gain = evidence(best) - evidence(plain)
    assert (gain >= 0).all()  # the first candidate is what is drawn without others
    assert (gain > 0).float().mean() > 0.5
    split = sample(toy, 30, labels, seed=1, drawing=Drawing(candidates=6), batch_size=7)
    assert all(torch.equal(best[name], split[name]) for name in best)


def test_what_is_given_is_kept_and_its_level_conditions_the_finer(toy):
    labels = torch.tensor([0, 1, 2, 0])
    free = sample(toy, 4, labels, seed=2)
    top = (free["top"] + 1) % 5
    found = sample(toy, 4, labels, seed=2, given={"top": top.to(torch.uint8)})
    assert torch.equal(found["top"], top)
    assert not torch.equal(found["bottom"], free["bottom"])
    half = free["bottom"].clone()
    half[:, 2:] = -1
    again = sample(toy, 4, labels, seed=2, given={"top": free["top"], "bottom": half}, batch_size=3)
    assert all(torch.equal(again[name], free[name]) for name in free)  # the same noise completes it in the same way


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"guidance": -0.1}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"candidates": 0}, "candidates"),
        ({"candidates": 2, "temperature": 0.0}, "all of them would be the same"),
    ],
)
def test_bad_drawings_are_refused(arguments, message):
    with pytest.raises(CodesError, match=message):
        Drawing(**arguments)


@pytest.mark.parametrize("drawing", [Drawing(guidance=2.0), Drawing(candidates=2)], ids=str)
def test_comparing_needs_labels_and_a_prior_that_knows_to_do_without(drawing):
    toy = make_toy(label_dropout=0.1)
    with pytest.raises(CodesError, match="every sample needs a class, not -1: give labels"):
        sample(toy, 2, torch.tensor([0, -1]), drawing=drawing)
    with pytest.raises(CodesError, match="label_dropout above 0"):
        sample(make_toy(label_dropout=0.0), 2, torch.tensor([0, 1]), drawing=drawing)
    unlabelled = from_preset("pixelcnn-tiny", [LevelShape("codes", 5, (2, 2))], 0, "tok", depth=8)
    asked = "guidance" if drawing.guidance > 1 else "candidates"
    with pytest.raises(
        CodesError, match=f"{asked}: would compare a class to any class, but this prior was trained without classes"
    ):
        sample(unlabelled, 2, drawing=drawing)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"middle": torch.zeros(2, 2, 2, dtype=torch.int64)}, "level 'middle'"),
        ({"top": torch.zeros(2, 2, 3, dtype=torch.int64)}, r"expected whole numbers \[2, 2, 2\]"),
        ({"top": torch.zeros(2, 2, 2)}, "whole numbers"),
        ({"top": torch.full((2, 2, 2), 5)}, r"expected 0\.\.4 .* found 5"),
        ({"top": torch.full((2, 2, 2), -2)}, "found -2"),
    ],
)
def test_wrong_given_codes_are_refused(toy, given, message):
    with pytest.raises(CodesError, match=message):
        sample(toy, 2, torch.tensor([0, 1]), given=given)
