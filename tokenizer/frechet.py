"""The Fréchet inception distance between two sets of images (Heusel et al. 2017), on the network that published figures use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

from tokenizer.weights import fill, read_weights
from vqmill.errors import UsageError

SIDE = 299  # pixels that the network looks at
DIMENSIONS = 2048  # of its features; with fewer images their covariance cannot have full rank
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"


class Moments:
    """Mean and covariance of vectors, added up in float64."""

    def __init__(self) -> None:
        self.number = 0
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, vectors: Tensor) -> None:
        """Takes up float [N, D]."""
        vectors = vectors.double()
        self.number += len(vectors)
        self._sum = self._sum + vectors.sum(dim=0)
        self._products = self._products + vectors.T @ vectors

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] (over N - 1), float64.

        Raises:
            UsageError: of fewer than two vectors.
        """
        if self.number < 2:
            raise UsageError(
                f"a Fréchet distance needs at least 2 images of each kind, found {self.number}. Take more."
            )
        assert isinstance(self._sum, Tensor)
        assert isinstance(self._products, Tensor)
        mean = self._sum / self.number
        return mean, (self._products - self.number * torch.outer(mean, mean)) / (self.number - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Between two Gaussians, squared: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982).

    The trace of the root is that of the symmetric (S1^(1/2) S2 S1^(1/2))^(1/2), so eigenvalues of symmetric matrices are all it takes.

    Args:
        first: mean [D] and covariance [D, D], float64.
        second: the same.
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ covariance2 @ root
    shared = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared
    return max(0.0, float(distance))


class Inception(nn.Module):
    """The features that FID is defined on: float [N, 2048].

    torchvision's Inception v3 with what the network of 2015 has otherwise: averages leave the padding out, the last block takes maxima.
    """

    def __init__(self) -> None:
        super().__init__()
        blocks: list[Callable[..., nn.Module]] = [
            inception.BasicConv2d, _average_pool(inception.InceptionA), inception.InceptionB, _average_pool(inception.InceptionC),
            inception.InceptionD, _average_pool(inception.InceptionE), inception.InceptionAux,
        ]  # fmt: skip
        self.net = inception.Inception3(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.net.Mixed_7c = _with_pool(inception.InceptionE, _max)(2048)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Looks at uint8 [N, C, H, W], grey or RGB, enlarged or reduced to 299 pixels a side (bilinear, without antialiasing)."""
        values = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
        return self.net(F.interpolate(values, size=(SIDE, SIDE), mode="bilinear", align_corners=False))


def load_inception(path: Path) -> Inception:
    """The network with the weights that published figures use.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid publishes.

    Raises:
        UsageError: the file is missing or holds other weights, torchvision's own among them.
    """
    weights = read_weights(path, WEIGHTS)
    with torch.device("meta"):
        model = Inception()
    fill(model.net, weights, str(path), WEIGHTS)
    model.net.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue] - features, not classes
    return model.eval()


def _average(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def _max(images: Tensor) -> Tensor:
    return F.max_pool2d(images, 3, stride=1, padding=1)


def _average_pool(block: type[nn.Module]) -> Callable[..., nn.Module]:
    return _with_pool(block, _average)


def _with_pool(block: type[nn.Module], pool: Callable[[Tensor], Tensor]) -> Callable[..., nn.Module]:
    """The same block with another pooling in its last branch."""

    class Pooled(block):
        def forward(self, x: Tensor) -> Tensor:
            *branches, _ = self._forward(x)  # pyright: ignore[reportCallIssue] - torchvision's blocks have it
            return torch.cat([*branches, self.branch_pool(pool(x))], dim=1)  # pyright: ignore[reportCallIssue]

    return Pooled
