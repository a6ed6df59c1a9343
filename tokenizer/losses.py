"""Reconstruction losses, and how a network's outputs become pixels. Pure functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.metrics import MIN_VARIANCE, nmse

LAPLACE_MARGIN = 0.1  # Ramesh et al. 2021, appendix A.3: pixels are mapped to [0.1, 0.9] before their logits are taken
MAX_LOG_SCALE = 7.0  # keeps exp() of a scale, or of its inverse, finite


def reconstruction_loss(kind: str, outputs: Tensor, images: Tensor, variance: Tensor) -> Tensor:
    """How far a network's outputs are from the images, a scalar; smaller is better.

    Args:
        kind: `mse`: mean squared error over the variance of the data (van den Oord et al. 2017 as in sonnet); `l1`: mean absolute error
            over its standard deviation; `log_laplace`: minus the log-likelihood in nats per value (Ramesh et al. 2021, eq. 2).
        outputs: float [N, C, H, W]; `log_laplace` [N, 2 C, H, W]: logits of the medians, then logarithms of the scales.
        images: float32 [N, C, H, W] in [-1, 1].
        variance: of the data, scalar.
    """
    outputs = outputs.float()
    if kind == "mse":
        return nmse(F.mse_loss(outputs, images), variance)
    if kind == "l1":
        return F.l1_loss(outputs, images) / variance.clamp(min=MIN_VARIANCE).sqrt()
    median, log_scale = outputs.chunk(2, dim=1)
    log_scale = MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)
    value = _inside(images)
    distance = (torch.logit(value) - median).abs() * torch.exp(-log_scale)
    return (distance + log_scale + math.log(2) + torch.log(value * (1 - value))).mean()


def pixels(kind: str, outputs: Tensor) -> Tensor:
    """The images that a network's outputs stand for, float32 [N, C, H, W], about [-1, 1]: see `reconstruction_loss`."""
    if kind != "log_laplace":
        return outputs.float()
    median = torch.sigmoid(outputs.float().chunk(2, dim=1)[0])
    return (median - LAPLACE_MARGIN) / (1 - 2 * LAPLACE_MARGIN) * 2 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> uint8 in [0, 255], rounded; of any shape."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def to_floats(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], of any shape; floats, which lie there already, -> float32."""
    return images.float() if images.is_floating_point() else images.float() / 127.5 - 1


def _inside(images: Tensor) -> Tensor:
    """[-1, 1] -> [0.1, 0.9], where logits are small."""
    return (images + 1) / 2 * (1 - 2 * LAPLACE_MARGIN) + LAPLACE_MARGIN
