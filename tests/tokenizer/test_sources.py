"""What test_imports.py does not show of faithfulness to sources: the grouped network, unixpickle's losses and its lower levels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer
from vqmill import CodesError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)


class Weights:
    """Hands out the convolutions of a part of a state dict in the order of their names, which is that of the layers."""

    def __init__(self, state: dict[str, Tensor], prefix: str) -> None:
        names = [name.removesuffix(".weight") for name in state if name.startswith(prefix) and name.endswith(".weight")]
        self.layers = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]

    def conv(self, x: Tensor, kernel: int) -> Tensor:
        """A convolution of stride 1 that keeps the sides."""
        weight, bias = self.layers.pop(0)
        assert weight.shape[2:] == (kernel, kernel)
        return F.conv2d(x, weight, bias, padding=(kernel - 1) // 2)


def published_block(weights: Weights, x: Tensor, depth_out: int, kernels: tuple[int, ...], gain: float) -> Tensor:
    """DALL-E: the identity path, through a 1x1 convolution when depths differ, and four convolutions, each after a ReLU."""
    path = weights.conv(x, 1) if x.shape[1] != depth_out else x
    for kernel in kernels:
        x = weights.conv(F.relu(x), kernel)
    return path + gain * x


@pytest.mark.parametrize(("groups", "blocks"), [(4, 1), (3, 2)])
def test_the_video_network_is_the_published_one(groups, blocks):
    torch.manual_seed(0)
    model = tokenizer.from_preset(
        "video_stacked_small", size=32, frames=3, hidden_dim=8, residual_dim=2, num_groups=groups, num_residual_blocks=blocks,
        codebook_size=16, code_dim=8, codebook_start="normal",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    state, gain = model.net.state_dict(), 1 / (groups * blocks) ** 2
    images = clips(2, 3, 3, 32, 32)
    stacked = images.reshape(2, 9, 32, 32) / 127.5 - 1  # (b, d, c, h, w) -> (b, d * c, h, w)

    weights = Weights(state, "encoder.")
    x = weights.conv(F.relu(weights.conv(stacked, 7)), 7)
    for group in range(1, groups + 1):
        for _ in range(blocks):
            x = published_block(weights, x, 8 * group, (3, 3, 3, 1), gain)
        x = F.max_pool2d(x, 2) if group < groups else x
    x = weights.conv(F.relu(x), 1)
    assert not weights.layers
    assert torch.equal(
        torch.cdist(x.permute(0, 2, 3, 1), state["levels.codes.codebook"]).argmin(-1), model.encode(images)["codes"]
    )
    torch.testing.assert_close(model.net.encoder(stacked), x)

    x = state["levels.codes.codebook"][model.encode(images)["codes"]].permute(0, 3, 1, 2)
    weights = Weights(state, "decoder.")
    for group in range(groups, 0, -1):
        for _ in range(blocks):
            x = published_block(weights, x, 8 * group, (1, 3, 3, 3), gain)
        x = F.interpolate(x, scale_factor=2, mode="nearest") if group > 1 else x
    x = weights.conv(F.relu(weights.conv(F.relu(x), 7)), 7)
    assert not weights.layers
    found = model.eval()(model.prepare(images)).images
    assert found.shape == (2, 3, 3, 32, 32)
    torch.testing.assert_close(found.reshape(2, 9, 32, 32), x)


def unixpickle(levels: int = 2) -> tokenizer.Tokenizer:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 8, "residual_dim": 8, "code_dim": 8, "codebook_size": 16, "size": 32}
    model = tokenizer.from_preset("unixpickle_256", num_levels=levels, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 2 if "codebook" not in name else 1
    return model.eval()


def test_unixpickles_decoders_learn_features_and_pixels():
    """Every decoder but the last has for its target the features that the next level quantizes, which it does not move."""
    model = unixpickle(3)
    net, images = model.net, model.prepare(clips(2, 3, 32, 32))
    result = model(images)
    x, features = (images + 1) / 2, []
    for encoder in net.encoders:
        x = encoder(x)
        features.insert(0, x)
    vectors = [result.levels[name].vectors for name in ("top", "middle", "bottom")]
    first = (net.decoders[0](vectors[:1]) - features[1]).square().mean()
    second = (net.decoders[1](vectors[:2]) - features[2]).square().mean()
    torch.testing.assert_close(result.auxiliary, first + second)
    torch.testing.assert_close(result.images, net.decoders[2](vectors) * 2 - 1)
    for name, feature in zip(("top", "middle", "bottom"), features, strict=True):
        distances = torch.cdist(feature.permute(0, 2, 3, 1), net.levels[name].codebook)
        assert torch.equal(distances.argmin(-1), result.levels[name].codes)
    weight = net.encoders[0].conv2.weight
    cut = [
        (net.decoders[place](vectors[: place + 1]) - features[place + 1].detach()).square().mean() for place in (0, 1)
    ]
    (found,), (expected,), (pulled,) = (
        torch.autograd.grad(loss, weight, retain_graph=True)
        for loss in (result.auxiliary, cut[0] + cut[1], first + second)
    )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, pulled)  # targets would pull, were they not cut off


def test_unixpickle_reconstructs_from_the_top_alone():
    model = unixpickle()
    images = clips(2, 3, 32, 32)
    codes = model.encode(images)
    top = model.decode({"top": codes["top"]}, torch.float32)
    net = model.net
    vectors = net.levels["top"].decode(codes["top"])
    predicted = net.decoders[0]([vectors])  # the bottom's features
    bottom = torch.cdist(predicted.permute(0, 2, 3, 1), net.levels["bottom"].codebook).argmin(-1)
    expected = model.decode({"top": codes["top"], "bottom": bottom}, torch.float32)
    assert torch.equal(top, expected)
    assert not torch.equal(top, model.decode(codes, torch.float32))
    assert top.shape == images.shape


def test_levels_are_left_out_from_below_only():
    three = unixpickle(3)
    codes = three.encode(clips(1, 3, 32, 32))
    assert three.decode({name: codes[name] for name in ("top", "middle")}).shape == (1, 3, 32, 32)
    with pytest.raises(CodesError, match="level middle is missing; all of top, middle are needed"):
        three.decode({name: codes[name] for name in ("top", "bottom")})
    with pytest.raises(CodesError, match="level top is missing"):
        three.decode({})
    small = {"hidden_dim": 8, "residual_dim": 4, "code_dim": 8, "codebook_size": 16}
    other = tokenizer.from_preset("rgb32", **small)
    with pytest.raises(CodesError, match="level bottom is missing; all of top, bottom are needed"):
        other.decode({"top": torch.zeros(1, 4, 4, dtype=torch.int64)})
