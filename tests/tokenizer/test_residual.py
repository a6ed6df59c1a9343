"""Residual quantization: every stage quantizes what is left over."""

from __future__ import annotations

import pytest
import torch

from tokenizer import EMAQuantizer, GradientQuantizer, Recipe, ResidualQuantizer

K, D = 16, 4
KINDS = [EMAQuantizer, GradientQuantizer]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(seed: int, shape=(8, D, 6, 6)) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def new(stages: int, kind=EMAQuantizer, **options) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer([kind(K, D, Recipe(**{"start_step": 1, **options})) for _ in range(stages)])


def update(quantizer, z, seed=0):
    with torch.no_grad():
        out = quantizer(z)
    return quantizer.update(out.counts, out.sums, out.pool, seeded(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_sums_of_entries_and_stages_see_left_overs(kind):
    quantizer = new(3, kind)
    update(quantizer, features(0))
    z = features(1, (2, D, 3, 5)).requires_grad_()
    out = quantizer(z)
    assert out.codes.shape == (2, 3, 3, 5)
    assert torch.equal(out.codes, quantizer.encode(z))
    assert torch.equal(out.vectors, quantizer.decode(out.codes))
    left, loss = z.detach(), 0
    for number, stage in enumerate(quantizer.stages):
        codes = torch.cdist(left.permute(0, 2, 3, 1).reshape(-1, D), stage.codebook.detach()).argmin(1).view(2, 3, 5)
        assert torch.equal(codes, out.codes[:, number])
        entries = stage.codebook.detach()[codes].permute(0, 3, 1, 2)
        loss += (1.25 if kind is GradientQuantizer else 0.25) * (left - entries).square().mean()
        torch.testing.assert_close(out.sums[number].sum(0), left.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
        left = left - entries
    torch.testing.assert_close(out.vectors, (z - left).detach())
    torch.testing.assert_close(out.loss.detach(), loss)
    assert torch.equal(out.counts.sum(1), torch.full((3,), 30.0))
    upstream = features(2, (2, D, 3, 5))
    (gradient,) = torch.autograd.grad(out.vectors, z, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_starts_from_what_is_left_over(kind):
    quantizer = new(3, kind)
    z = features(0)
    replaced = update(quantizer, z)
    assert set(replaced) == {f"stages.{number}.codebook" for number in range(3)}
    assert all(mask.all() for mask in replaced.values())
    sizes = [float(stage.codebook.detach().norm(dim=1).mean()) for stage in quantizer.stages]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * sizes[2]
    assert all(len(quantizer.encode(z)[:, number].unique()) > K // 2 for number in range(3))


def test_more_stages_leave_less_over():
    errors = []
    for stages in (1, 2, 4):
        quantizer = new(stages)
        for seed in range(30):
            update(quantizer, features(seed), seed)
        z = features(99, (32, D, 8, 8))
        errors.append(float((quantizer.decode(quantizer.encode(z)) - z).square().mean()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_features_pass_unquantized_before_the_start():
    quantizer = new(2, start_step=2).train()
    z = features(0)
    assert torch.equal(quantizer(z).vectors, z)
    assert quantizer(z).loss == 0
    for _ in range(2):
        assert not torch.equal(quantizer.eval()(z).vectors, z)
        update(quantizer, z)
    out = quantizer.train()(z)
    assert torch.equal(out.vectors, quantizer.decode(out.codes))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_pure_exact_and_in_float32(kind):
    quantizer = new(2, kind, rotation=True)
    update(quantizer, features(0))
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    state = torch.get_rng_state()
    z = features(1)
    out = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = quantizer(z)
    assert torch.equal(low.vectors, out.vectors)
    assert torch.equal(out.vectors, quantizer.decode(out.codes))
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_each_stage_keeps_vectors(kind):
    quantizer = new(2, kind)
    for seed in range(4):
        update(quantizer, features(seed))
    z = features(9)
    before = quantizer(z)
    quantizer.sort_by_usage()
    after = quantizer(z)
    assert torch.equal(before.vectors, after.vectors)
    assert not torch.equal(before.codes, after.codes)
    assert all((stage.ema_counts.diff() <= 0).all() for stage in quantizer.stages)
