"""Parameter counts of the presets, stated as the sums of their sources' layers."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tokenizer import PRESETS, Tokenizer, TokenizerConfig, from_preset, preset_config
from tokenizer.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "tokenizers.md"


def conv(depth_in: int, depth_out: int, kernel: int, bias: bool = True) -> int:
    """Of a convolution, transposed or not."""
    return depth_in * depth_out * kernel**2 + bias * depth_out


def weights(model: Tokenizer) -> int:
    """All that the optimizer learns but codebooks."""
    return sum(tensor.numel() for name, tensor in model.named_parameters() if "codebook" not in name)


def codebooks(model: Tokenizer) -> list[int]:
    return [tensor.numel() for name, tensor in model.state_dict().items() if name.endswith(("codebook", "ema_sums"))]


def block(width: int, inner: int, bias: bool) -> int:
    return conv(width, inner, 3, bias) + conv(inner, width, 1, bias)


def test_zalando_cifar():
    encoder = conv(3, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3) + 2 * block(128, 32, False)
    decoder = conv(64, 128, 3) + 2 * block(128, 32, False) + conv(128, 64, 4) + conv(64, 3, 4)
    codebook = 512 * 64
    assert (encoder, conv(128, 64, 1), decoder, codebook) == (363_840, 8_256, 289_987, 32_768)
    gradient, ema = from_preset("zalando_cifar", quantizer="gradient"), from_preset("zalando_cifar")
    assert gradient.num_parameters == weights(gradient) + codebook == encoder + 8_256 + decoder + codebook == 694_851
    assert ema.num_parameters == weights(gradient) == 662_083
    assert (
        ema.num_parameters + sum(codebooks(ema)) == 694_851 + codebook == 727_619
    )  # as the notebook counts: entries and sums


@pytest.mark.parametrize(
    ("preset", "channels", "bias"), [("sonnet_cifar", 3, 4 * (32 + 128)), ("nngen_mnist", 1, 4 * (32 + 128))]
)
def test_the_same_layers_with_biases(preset, channels, bias):
    model = from_preset(preset)
    assert weights(model) == 662_083 + bias - (3 - channels) * (64 * 16 + 64 * 16 + 1)


def test_rosinality():
    model = from_preset("rgb256", residual_dim=32)
    blocks = 2 * block(128, 32, True)
    parts = {
        "enc_b": conv(3, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3) + blocks,
        "enc_t": conv(128, 64, 4) + conv(64, 128, 3) + blocks,
        "quantize_conv": conv(128, 64, 1) + conv(64 + 128, 64, 1),
        "dec_t": conv(64, 128, 3) + blocks + conv(128, 64, 4),
        "upsample_t": conv(64, 64, 4),
        "dec": conv(128, 128, 3) + blocks + conv(128, 64, 4) + conv(64, 3, 4),
    }
    assert weights(model) == sum(parts.values()) == 1_388_867
    assert codebooks(model) == 4 * [512 * 64]


def test_unixpickle_256():
    width = 128
    blocks = 2 * block(width, width, True)
    quarter_encoder = conv(3, width, 4) + conv(width, width, 4) + blocks
    half_encoder = conv(width, width, 3) + blocks
    half_decoder = blocks + conv(width, width, 4)
    half_quarter_decoder = (
        2 * blocks + conv(width, width, 4) + conv(2 * width, width, 3) + conv(width, width, 4) + conv(width, 3, 4)
    )
    model = from_preset("unixpickle_256")
    assert weights(model) == quarter_encoder + half_encoder + half_decoder + half_quarter_decoder
    assert codebooks(model) == 2 * [512 * width]


def grouped_block(depth_in: int, depth_out: int, kernels: tuple[int, ...]) -> int:
    quarter = depth_out // 4
    depths = (depth_in, quarter, quarter, quarter, depth_out)
    path = sum(conv(*pair, kernel) for pair, kernel in zip(pairwise(depths), kernels, strict=True))
    return path + (conv(depth_in, depth_out, 1) if depth_in != depth_out else 0)


def test_video_stacked_13m():
    widths = [64, 64, 128, 192, 256]
    encoder = conv(90, 256, 7) + conv(256, 64, 7) + conv(256, 512, 1)
    encoder += sum(grouped_block(*pair, (3, 3, 3, 1)) for pair in pairwise(widths))
    depths = [512, 256, 192, 128, 64]
    decoder = conv(64, 256, 7) + conv(256, 90, 7)
    decoder += sum(grouped_block(*pair, (1, 3, 3, 3)) for pair in pairwise(depths))
    model = from_preset("video_stacked_13m")
    assert encoder == 2_509_792 == sum(tensor.numel() for tensor in model.net.encoder.parameters())
    assert decoder == 2_614_842 == sum(tensor.numel() for tensor in model.net.decoder.parameters())
    assert encoder + decoder == 5_124_634 == model.num_parameters
    assert codebooks(model) == [8192 * 512, 8192 * 512]
    assert model.num_parameters + sum(codebooks(model)) == 13_513_242  # as its README prints


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_has_the_right_numbers(name):
    """docs/tokenizers.md: a section for each preset, with its parameters, its grids and its codebooks."""
    section = PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert section, f"docs/tokenizers.md has no section on {name}"
    config = preset_config(name)
    with torch.device("meta"):
        model = Tokenizer(config)
    assert f"{model.num_parameters:,} parameters" in section
    for level in config.level_names:
        assert f"`{level}` {' x '.join(map(str, config.grid(level)))}" in section
    assert f"K {config.codebook_size:,}, D {config.code_dim}" in section
    assert f"--preset {name}" in section or config.frames > 1


LAYER = re.compile(r"(\d)x\1 (\d+)-(\d+)")


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("rgb256", "unixpickle_256")])
def test_the_layer_tables_are_the_models(name):
    """Every convolution that a table names outside of blocks is in the model, and the other way round."""
    section = PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    named = sorted(tuple(map(int, found)) for found in LAYER.findall("\n".join(rows)))
    with torch.device("meta"):
        model = Tokenizer(preset_config(name))
    layers = [
        (layer.kernel_size[0], layer.in_channels, layer.out_channels)
        for path, layer in model.net.named_modules()
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
        and not re.search(r"conv[13]$|convs|identity", path)
    ]
    assert named == sorted(layers)


def test_the_configuration_page_says_what_the_docstring_says():
    page = (PAGE.parent / "configuration.md").read_text()
    text = TokenizerConfig.__doc__
    assert text
    meanings = re.split(r"\n {4,8}(\w+): ", text.partition("Attributes:")[2])[1:]
    described = {name: " ".join(words.split()) for name, words in zip(meanings[::2], meanings[1::2], strict=True)}
    values = TokenizerConfig().to_dict()
    assert described.keys() == values.keys()
    for name in values.keys() - {"preset"}:
        assert f"| `{name}` | `{values[name]}` | {described[name]} |" in page, name
    for preset, changes in PRESETS.items():
        for name, value in changes.items():
            assert f"{name} {value}" in page.partition(f"- `{preset}`: ")[2].partition("\n")[0], preset


def test_the_configuration_page_has_every_rule():
    rows = [f"| {', '.join(f'`{name}`' for name in rule.options)} | `{rule.words}` |" for rule in RULES]
    page = (PAGE.parent / "configuration.md").read_text()
    assert page.partition("| given | needs |\n|---|---|\n")[2].partition("\n\n")[0].splitlines() == rows
