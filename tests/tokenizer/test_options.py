"""What each option of a learned codebook does: starts, revivals, unit length, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenizer import EMAQuantizer, GradientQuantizer, Recipe, TokenizerStep, from_preset

K, D = 8, 4
KINDS = [EMAQuantizer, GradientQuantizer]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(seed: int, shape: tuple[int, ...] = (6, D, 5, 5)) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def update(quantizer, z, seed=0):
    with torch.no_grad():
        out = quantizer(z)
    return quantizer.update(out.counts, out.sums, out.pool, seeded(seed))["codebook"]


def new(kind, size=K, **options):
    torch.manual_seed(0)
    return kind(size, D, Recipe(**options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"rotation": True}], ids=str)
def test_forward_is_pure_and_exact(kind, options):
    quantizer = new(kind, start_step=1, **options)
    update(quantizer, features(0))
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    state = torch.get_rng_state()
    z = features(1).requires_grad_()
    for mode in (True, False):
        out = quantizer.train(mode)(z)
        assert torch.equal(out.vectors, quantizer.entries[out.codes].permute(0, 3, 1, 2))  # bit for bit
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = quantizer(z)
        assert low.vectors.dtype == torch.float32
        assert torch.equal(low.vectors, out.vectors)
        assert torch.equal(low.codes, out.codes)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_random_starts_quantize_from_the_beginning(kind):
    uniform, normal = (new(kind, 512, codebook_start=start) for start in ("uniform", "normal"))
    assert uniform.codebook.abs().max() <= 1 / 512
    assert uniform.codebook.std().item() == pytest.approx(2 / 512 / 12**0.5, rel=0.1)
    assert normal.codebook.std().item() == pytest.approx(1, rel=0.1)
    out = normal.train()(features(0))
    assert torch.equal(out.vectors, normal.decode(out.codes))
    assert out.loss > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_k_means_start_comes_with_its_update_and_replaces_all(kind):
    quantizer = new(kind, start_step=2)
    z = features(0)
    assert not update(quantizer.train(), z).any()
    assert quantizer(z).loss == 0
    assert update(quantizer, z).all()
    distance = (
        torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, D), quantizer.codebook.detach()).min(1).values.square().mean()
    )
    chosen = z.permute(0, 2, 3, 1).reshape(-1, D)[:K]
    assert distance < 0.7 * torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, D), chosen).min(1).values.square().mean()
    assert quantizer(z).loss > 0


def test_one_update_makes_an_entry_the_exact_mean_of_its_features():
    quantizer = new(EMAQuantizer, codebook_start="normal", revival="none", ema_decay=0.99)
    start = quantizer.codebook.clone()
    z = features(1)
    out = quantizer(z)
    update(quantizer, z)
    rows, codes = z.permute(0, 2, 3, 1).reshape(-1, D), out.codes.flatten()
    for code in range(K):
        own = rows[codes == code]
        expected = own.mean(0) if len(own) else start[code]  # neither drawn to zero nor to where it began
        torch.testing.assert_close(quantizer.codebook[code], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_codes_come_back_when_the_source_would_revive_them(kind):
    """unixpickle/vq-vae-2: counts begin at 100; a pass takes 1 from all and gives 100 to used ones; at 0 the code is revived."""
    patience = 100
    quantizer = new(kind, 16, codebook_start="normal", revival="unused", revive_after=patience)
    counts = torch.full((16,), patience)
    generator, revived = seeded(3), 0
    for step in range(350):
        used = torch.randint(0, 2 if step % 150 < 120 else 8, (10,), generator=generator)
        uses = torch.bincount(used, minlength=16).float()
        pool = torch.randn(5, D, generator=generator)
        with torch.no_grad():
            replaced = quantizer.update(uses, torch.zeros(16, D), pool, seeded(step))["codebook"]
        counts = (counts - 1 + (patience + 1) * (uses > 0)).clamp(0, patience)
        assert torch.equal(replaced, counts == 0), step
        if replaced.any():
            assert (quantizer.codebook[replaced][:, None] == pool).all(2).any(1).all()  # from the last batch
            revived += int(replaced.sum())
        counts[counts == 0] = patience
    assert revived > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("revival", ["rare", "unused", "none"])
def test_revivals(kind, revival):
    quantizer = new(kind, start_step=1, revival=revival, revive_after=3)
    update(quantizer, features(0))
    with torch.no_grad():
        quantizer.codebook[2] = 1e3
        quantizer.ema_counts[2] = 1e-4
        if kind is EMAQuantizer:
            quantizer.ema_sums[2] = 0.1
    masks = [update(quantizer, features(1 + step), step) for step in range(4)]
    first = next((step for step, mask in enumerate(masks) if mask[2]), None)
    assert first == {"rare": 0, "unused": 2, "none": None}[revival]
    assert bool((quantizer.codebook[2] > 900).all()) == (revival == "none")
    assert not any(mask[[0, 1, 3, 4, 5, 6, 7]].any() for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_normalized_codes_are_the_nearest_by_angle(kind):
    quantizer = new(kind, normalize=True, codebook_start="normal")
    lengths = torch.rand(6, 1, 5, 5, generator=seeded(5)) * 100 + 0.01
    z = features(1) * lengths
    out = quantizer(z)
    torch.testing.assert_close(out.vectors.norm(dim=1), torch.ones(6, 5, 5))
    cosine = F.cosine_similarity(z[:, None], quantizer.codebook.detach()[None, :, :, None, None], dim=2)
    assert torch.equal(out.codes, cosine.argmax(1))
    assert not torch.equal(out.codes, new(kind, codebook_start="normal")(z).codes)
    update(quantizer, z)
    torch.testing.assert_close(quantizer.decode(out.codes).norm(dim=1), torch.ones(6, 5, 5))


def test_a_gradient_codebook_learns_from_its_features_alone():
    quantizer = new(GradientQuantizer, codebook_start="normal", commitment_cost=0.7)
    z = features(1).requires_grad_()
    out = quantizer(z)
    (found,) = torch.autograd.grad(out.loss, quantizer.codebook, retain_graph=True)
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    F.mse_loss(codebook[out.codes].permute(0, 3, 1, 2), z.detach()).backward()
    torch.testing.assert_close(found, codebook.grad)
    (commitment,) = torch.autograd.grad(out.loss, z, retain_graph=True)
    torch.testing.assert_close(commitment, 0.7 * 2 * (z - out.vectors).detach() / z.numel())
    (nothing,) = torch.autograd.grad(out.vectors.sum(), quantizer.codebook, allow_unused=True)
    assert nothing is None  # the decoder does not move entries
    error = F.mse_loss(out.vectors, z).item()
    optimizer = torch.optim.SGD([quantizer.codebook], lr=10)
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(z.detach()).loss.backward()
        optimizer.step()
    assert F.mse_loss(quantizer(z).vectors, z).item() < 0.8 * error


def test_replaced_rows_of_gradient_codebooks_are_reported_under_the_parameters_name():
    torch.manual_seed(0)
    sizes = {"hidden_dim": 8, "residual_dim": 4, "num_residual_blocks": 1, "code_dim": 4, "codebook_size": 16}
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    for options, number in (({}, 2), ({"num_quantizers": 2}, 4), ({"quantizer": "ema"}, 0)):
        step = TokenizerStep(from_preset("rgb32", **{**sizes, "quantizer": "gradient", "start_step": 1, **options}))
        out = step({"images": images})
        replaced = step.update(out.sums, out.pools, seeded())
        parameters = dict(step.named_parameters())
        assert len(replaced) == number
        for name, mask in replaced.items():
            assert parameters[name].shape == (16, 4)
            assert mask.dtype == torch.bool
            assert mask.all()  # the k-means start replaces every row


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_moves_everything_together(kind):
    quantizer = new(kind, start_step=1)
    for seed in range(3):
        update(quantizer, features(seed))
    z = features(9)
    before, idle = quantizer(z), quantizer.idle_updates.clone()
    with torch.no_grad():
        quantizer.idle_updates.copy_(torch.arange(K))
    order = torch.argsort(quantizer.ema_counts, descending=True, stable=True)
    quantizer.sort_by_usage()
    after = quantizer(z)
    assert (quantizer.ema_counts.diff() <= 0).all()
    assert torch.equal(before.vectors, after.vectors)
    assert torch.equal(order[after.codes], before.codes)
    assert torch.equal(quantizer.idle_updates, order)
    assert len(idle) == K
