"""Metrics on cases that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from tokenizer.metrics import nmse, perplexity, psnr, used_codes


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
