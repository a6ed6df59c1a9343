"""Reconstruction losses against naive formulas, and that each of them trains."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizer import TokenizerStep, from_preset
from tokenizer.losses import pixels, reconstruction_loss


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_mse_and_l1_are_in_units_of_the_spread():
    outputs, images = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1).tanh()
    variance = torch.tensor(0.25)
    numbers = [abs(float(a) - float(b)) for a, b in zip(outputs.flatten(), images.flatten(), strict=True)]
    mse, l1 = (float(reconstruction_loss(kind, outputs, images, variance)) for kind in ("mse", "l1"))
    assert mse == pytest.approx(sum(number**2 for number in numbers) / len(numbers) / 0.25, rel=1e-5)
    assert l1 == pytest.approx(sum(numbers) / len(numbers) / 0.5, rel=1e-5)
    for kind in ("mse", "l1"):
        assert reconstruction_loss(kind, outputs, images, torch.tensor(0.0)).isfinite()
        assert torch.equal(pixels(kind, outputs), outputs)


def naive_log_laplace(median: float, log_scale: float, value: float) -> float:
    """-log of the density of x in (0, 1) whose logit is Laplace distributed (Ramesh et al. 2021, eq. 2)."""
    scale = math.exp(7 * math.tanh(log_scale / 7))
    logit = math.log(value / (1 - value))
    return -math.log(math.exp(-abs(logit - median) / scale) / (2 * scale * value * (1 - value)))


def test_log_laplace_is_minus_the_log_of_a_density():
    outputs, images = randn(2, 6, 3, 3), randn(2, 3, 3, 3, seed=1).tanh()
    median, log_scale = outputs[:, :3].flatten().tolist(), outputs[:, 3:].flatten().tolist()
    values = ((images + 1) / 2 * 0.8 + 0.1).flatten().tolist()
    expected = [naive_log_laplace(*each) for each in zip(median, log_scale, values, strict=True)]
    found = reconstruction_loss("log_laplace", outputs, images, torch.tensor(1.0))
    assert float(found) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize(("median", "log_scale"), [(0.0, 0.0), (1.0, -1.0), (-0.7, 0.5)])
def test_log_laplace_is_the_density_of_the_mapped_value(median, log_scale):
    """Its mass over all of (0, 1), of which pixels take [0.1, 0.9], is 1; the sum runs over logits, where the density is smooth."""
    step = 24 / 1500
    value = torch.sigmoid(torch.arange(1500, dtype=torch.float64) * step - 12)
    images = ((value - 0.1) / 0.8 * 2 - 1).float()
    outputs = torch.tensor([median, log_scale]).reshape(1, 2, 1, 1)
    losses = [
        reconstruction_loss("log_laplace", outputs, image.reshape(1, 1, 1, 1), torch.tensor(1.0)) for image in images
    ]
    mass = torch.exp(-torch.stack(losses).double()) * value * (1 - value) * step
    assert float(mass.sum()) == pytest.approx(1, abs=5e-3)


def test_log_laplace_reconstructs_its_median():
    value = torch.tensor([0.1, 0.5, 0.9])
    outputs = torch.cat([torch.logit(value), torch.tensor([9.0, -9.0, 0.0])]).reshape(1, 6, 1, 1)
    torch.testing.assert_close(
        pixels("log_laplace", outputs).flatten(), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-6, rtol=1e-5
    )


def test_log_laplace_stays_finite():
    outputs = torch.full((1, 2, 1, 1), 1e4).requires_grad_()
    loss = reconstruction_loss(
        "log_laplace", outputs * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), -torch.ones(1, 1, 1, 1), torch.tensor(1.0)
    )
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def blobs(num: int, seed: int) -> torch.Tensor:
    centres = torch.rand(num, 2, 1, 1, generator=torch.Generator().manual_seed(seed)) * 16
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    distance = (y - centres[:, 0]).square() + (x - centres[:, 1]).square()
    return (8 * x + 120 * (distance < 12))[:, None].to(torch.uint8)


@pytest.mark.parametrize("kind", ["mse", "l1", "log_laplace"])
def test_each_loss_trains(kind):
    torch.manual_seed(0)
    sizes = {"codebook_size": 16, "code_dim": 8, "hidden_dim": 16, "residual_dim": 8, "num_residual_blocks": 1}
    step = TokenizerStep(from_preset("grey28", loss=kind, start_step=10, **sizes))
    optimizer, generator = torch.optim.Adam(step.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    held_out = [{"images": blobs(32, 1000)}]
    before = step.evaluate(held_out)
    for seed in range(30):
        out = step({"images": blobs(16, seed)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.update(out.sums, out.pools, generator)
    after = step.evaluate(held_out)
    assert after["nmse"] < 0.6 * before["nmse"]
    assert after["loss"] < before["loss"]
