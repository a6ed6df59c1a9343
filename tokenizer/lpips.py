"""LPIPS: how different two images look to a network that classifies images (Zhang et al. 2018), version 0.1.

The network is torchvision's AlexNet or VGG16 with its own weights; the weights of the differences are those that the package `lpips`
ships. Both are read from files; see `load_lpips`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from tokenizer.weights import fill, read_weights
from vqmill.errors import CodesError, UsageError

MEAN, DEVIATION = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # of ImageNet's pixels in [-1, 1], as lpips 0.1 has them
TINY = 1e-10  # keeps positions without features from dividing by zero


@dataclass(frozen=True)
class Backbone:
    """A network that LPIPS is defined on.

    Attributes:
        name: for people.
        build: makes it.
        file: the name of its weights in torch's cache.
        taps: the layers of `features` whose outputs are compared.
        channels: of those outputs.
        smallest: the least side of an image, pixels, from which the last output is not empty.
    """

    name: str
    build: Callable[[], nn.Module]
    file: str
    taps: tuple[int, ...]
    channels: tuple[int, ...]
    smallest: int


BACKBONES = (
    Backbone(
        "AlexNet", lambda: torchvision.models.alexnet(weights=None), "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11),
        (64, 192, 384, 256, 256), 31,
    ),
    Backbone(
        "VGG16", lambda: torchvision.models.vgg16(weights=None), "vgg16-397923af.pth", (3, 8, 15, 22, 29),
        (64, 128, 256, 512, 512), 16,
    ),
)  # fmt: skip


class LPIPS(nn.Module):
    """The distance between two images: 0 for equal ones, rarely above 1.

    Args:
        backbone: which network.
        features: its layers, with weights.
        weights: float [C] for each tap, not negative: what a squared difference in each channel counts.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: Backbone, features: nn.Module, weights: list[Tensor]) -> None:
        super().__init__()
        self.backbone, self.features = backbone, features
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Compares images float [N, C, H, W] in [-1, 1], grey or RGB, with others of their shape: float64 [N].

        Raises:
            CodesError: they are smaller than the network can see.
        """
        if min(images.shape[-2:]) < self.backbone.smallest:
            raise CodesError(
                f"LPIPS with {self.backbone.name} needs images of at least {self.backbone.smallest} pixels a side, these are "
                f"{images.shape[-2]}x{images.shape[-1]}. Evaluate at a larger --size, or without --lpips."
            )
        pairs = zip(self._unit_features(images), self._unit_features(others), self.weights, strict=True)
        distances = [
            ((a - b).square().mean(dim=(2, 3)) * weight).sum(dim=1, dtype=torch.float64) for a, b, weight in pairs
        ]
        return torch.stack(distances).sum(dim=0)

    def _unit_features(self, images: Tensor) -> list[Tensor]:
        """The outputs at the taps [N, C, h, w], each position's vector of length 1."""
        values = (images.expand(-1, 3, -1, -1) - self.mean) / self.deviation
        found = []
        for place, layer in enumerate(self.features.children()):
            if place > self.backbone.taps[-1]:
                break
            values = layer(values)
            if place in self.backbone.taps:
                found.append(values / (values.square().sum(dim=1, keepdim=True).sqrt() + TINY))
        return found


def load_lpips(linear: Path, backbone: Path | None = None) -> LPIPS:
    """LPIPS from files; which network it is on shows in the first.

    Args:
        linear: `weights/v0.1/alex.pth` or `vgg.pth` of the package lpips.
        backbone: torchvision's ImageNet weights of that network; where torch keeps downloads (`torch.hub.get_dir()`) if None.

    Raises:
        UsageError: a file is missing, or not what is expected.
    """
    expected = "weights/v0.1/alex.pth or vgg.pth of the package lpips (0.1)"
    found = read_weights(linear, expected)
    names = [f"lin{place}.model.1.weight" for place in range(len(found))]
    if sorted(found) != names:
        raise UsageError(f"{linear}: expected {expected}, found other weights: {', '.join(sorted(found)[:3])} ...")
    weights = [found[name].flatten() for name in names]
    channels = tuple(len(weight) for weight in weights)
    matching = [net for net in BACKBONES if net.channels == channels]
    if not matching:
        raise UsageError(f"{linear}: expected {expected}, found weights of another network, with {channels} channels.")
    return LPIPS(matching[0], _features(matching[0], backbone), weights).eval()


def _features(net: Backbone, path: Path | None) -> nn.Module:
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / net.file
    expected = f"torchvision's ImageNet weights of {net.name} ({net.file})"
    weights: Mapping[str, Tensor] = read_weights(path, expected)
    with torch.device("meta"):  # without drawing weights that are thrown away
        features = net.build().features
    assert isinstance(features, nn.Module)
    mine = {name.removeprefix("features."): value for name, value in weights.items() if name.startswith("features.")}
    return fill(features, mine, str(path), expected)
