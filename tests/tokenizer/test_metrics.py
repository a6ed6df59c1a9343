"""Metrics on cases that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizer.metrics import entropy_bits, nmse, perplexity, psnr, ssim, used_codes
from vqmill import CodesError


def test_normalised_error():
    assert float(nmse(torch.tensor(0.1), torch.tensor(0.5))) == pytest.approx(0.2)
    assert torch.isfinite(nmse(torch.tensor(0.1), torch.tensor(0.0)))


def test_psnr_does_not_depend_on_the_scale_of_pixels():
    assert float(psnr(torch.tensor(4.0))) == pytest.approx(0)
    assert float(psnr(torch.tensor(0.04))) == pytest.approx(float(psnr(torch.tensor(0.04 * 127.5**2), peak=255.0)))
    assert torch.isfinite(psnr(torch.tensor(0.0)))


@pytest.mark.parametrize(
    ("counts", "value", "used"), [([7], 1, 1), ([3, 3, 3, 3], 4, 4), ([5, 0, 5], 2, 2), ([0, 0], 0, 0)]
)
def test_perplexity_and_used_codes(counts, value, used):
    assert float(perplexity(torch.tensor(counts))) == pytest.approx(value)
    assert int(used_codes(torch.tensor(counts))) == used


def naive_ssim(first: torch.Tensor, second: torch.Tensor, peak: float) -> float:
    """SSIM of two images [C, H, W] as the paper writes it, pixel by pixel."""
    gauss = [[math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5**2)) for x in range(11)] for y in range(11)]
    whole = sum(map(sum, gauss))
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    channels, height, width = first.shape
    found = []
    for channel in range(channels):
        for top in range(height - 10):
            for left in range(width - 10):
                window = [
                    (gauss[y][x] / whole, float(first[channel, top + y, left + x]), float(second[channel, top + y, left + x]))
                    for y in range(11)
                    for x in range(11)
                ]  # fmt: skip
                a, b = sum(w * p for w, p, _ in window), sum(w * q for w, _, q in window)
                var_a = sum(w * (p - a) ** 2 for w, p, _ in window)
                var_b = sum(w * (q - b) ** 2 for w, _, q in window)
                both = sum(w * (p - a) * (q - b) for w, p, q in window)
                found.append((2 * a * b + c1) * (2 * both + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2)))
    return sum(found) / len(found)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_one_of_the_paper(channels):
    generator = torch.Generator().manual_seed(channels)
    first = torch.randint(0, 256, (2, channels, 13, 15), generator=generator).float()
    second = (first + 40 * torch.randn(first.shape, generator=generator)).clamp(0, 255)
    expected = [naive_ssim(a, b, 255.0) for a, b in zip(first, second, strict=True)]
    assert 0.1 < expected[0] < 0.99
    assert ssim(first, second, peak=255.0).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(first / 255, second / 255).tolist() == pytest.approx(expected, rel=1e-5), "pixels in [0, 1] by default"


def test_ssim_of_equal_and_of_unlike_images():
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ssim(images, images, peak=1.0).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    assert ssim(images, 1 - images, peak=1.0).max() < -0.3
    torch.testing.assert_close(ssim(images, other), ssim(other, images))
    flat = torch.full((1, 1, 11, 11), 0.3)
    assert float(ssim(flat, 2 * flat)) == pytest.approx((2 * 0.18 + 1e-4) / (0.09 + 0.36 + 1e-4)), "luminance alone"
    clips = ssim(images.unflatten(0, (1, 3)), other.unflatten(0, (1, 3)))
    assert float(clips) == pytest.approx(float(ssim(images, other).mean())), "frames of a clip are averaged"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((1, 3, 10, 30), (1, 3, 10, 30)), "the images are 10x30"), (((1, 3, 16, 16), (2, 3, 16, 16)), "one shape")],
)
def test_ssim_refuses_what_it_cannot_measure(shapes, message):
    with pytest.raises(CodesError, match=message):
        ssim(*(torch.zeros(shape) for shape in shapes))


def test_entropy_is_in_bits():
    assert float(entropy_bits(torch.tensor([4, 2, 1, 1]))) == pytest.approx(1.75)
    assert float(entropy_bits(torch.tensor([0, 0]))) == 0
