"""How good reconstructions are, and how much of a codebook is used. Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqmill.errors import CodesError

SSIM_WINDOW = 11  # pixels a side; this and the next three are those of Wang et al. 2004, section III.B
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03
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


def ssim(images: Tensor, others: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity of each image with its counterpart: 1 for equal images, about 0 for unrelated ones (Wang et al. 2004).

    An 11x11 Gaussian window of sigma 1.5 pixels, K1 = 0.01, K2 = 0.03, variances that divide by the sum of the weights. Computed for each
    channel by itself and averaged over channels and over all windows that lie wholly inside the image. These are the settings that
    scikit-image's `structural_similarity` documents for the paper's figures (gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False), with channel_axis. The paper itself looks at grey images.

    Args:
        images: [N, ..., H, W], numbers in [0, peak], black at 0 (the luminance term would be another for [-1, 1]); H and W at least 11.
        others: of the same shape.
        peak: white: 1, or 255 for bytes.

    Returns:
        float64 [N] in [-1, 1].

    Raises:
        CodesError: the shapes differ, or the images are smaller than the window.
    """
    if images.shape != others.shape or images.ndim < 3:
        raise CodesError(
            f"SSIM: expected two batches of images of one shape, found {list(images.shape)} and {list(others.shape)}."
        )
    height, width = images.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise CodesError(
            f"SSIM: its window is {SSIM_WINDOW}x{SSIM_WINDOW} pixels, the images are {height}x{width}. Take larger images, or another measure."
        )
    x, y = images.double(), others.double()
    mean_x, mean_y, square_x, square_y, product = _windows(torch.stack([x, y, x.square(), y.square(), x * y]))
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return similarity.flatten(1).mean(dim=1)


def _windows(images: Tensor) -> Tensor:
    """Gaussian means over all windows that lie inside: [..., H, W] -> [..., H - 10, W - 10].

    Sums of shifted images rather than convolutions, which devices may round to TF32 and autocast to bfloat16.
    """
    radius = SSIM_WINDOW // 2
    weights = [math.exp(-((place - radius) ** 2) / (2 * SSIM_SIGMA**2)) for place in range(SSIM_WINDOW)]
    for axis in (-2, -1):
        length = images.shape[axis] - SSIM_WINDOW + 1
        total = torch.zeros_like(images.narrow(axis, 0, length))
        for place, weight in enumerate(weights):
            total.add_(images.narrow(axis, place, length), alpha=weight / sum(weights))
        images = total
    return images


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


def entropy_bits(counts: Tensor) -> Tensor:
    """Bits that a code carries on average, if each is drawn by itself: log2 of the perplexity; in [0, log2 K].

    Args:
        counts: as for `perplexity`; no codes at all give 0.

    >>> float(entropy_bits(torch.tensor([5, 5, 0])))
    1.0
    """
    return perplexity(counts).clamp(min=1).log2()
