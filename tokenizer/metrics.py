"""How good reconstructions are, and how much of a codebook is used. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_VARIANCE = (1 / 255) ** 2  # half a grey level, for pixels in [-1, 1]: images that are all one colour have none


def nmse(mse: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error over the variance of the data: 0 is perfect, 1 is as good as painting everything in the mean colour."""
    return mse / variance.clamp(min=MIN_VARIANCE)


def psnr(mse: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, from the mean squared error over a whole set; `peak` is the range of the pixels.

    >>> round(float(psnr(torch.tensor(0.04))), 6)
    20.0
    """
    return 10 * torch.log10(peak**2 / mse.clamp(min=1e-12))


def perplexity(counts: Tensor) -> Tensor:
    """How many codes a uniform choice would need to be as varied as this one: exp of the entropy; in [1, K].

    Args:
        counts: [..., K], how often each code occurs in a whole data set; no codes at all give 0.

    >>> float(perplexity(torch.tensor([5, 5, 0])))
    2.0
    """
    counts = counts.double()
    total = counts.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(counts / total.clamp(min=1)).sum(dim=-1)
    return (total.squeeze(-1) > 0) * entropy.exp()  # no branch: no wait for the device


def used_codes(counts: Tensor) -> Tensor:
    """How many codes of [..., K] occur at least once, int64.

    >>> int(used_codes(torch.tensor([5, 5, 0])))
    2
    """
    return (counts > 0).sum(dim=-1)
