"""Tokenizers: shapes, round trips, range checks, and the conditioning of the bottom on the top."""

from __future__ import annotations

import pytest
import torch

import tokenizer
from vqmill import CodesError

SMALL = {"codebook_size": 16, "code_dim": 8, "hidden_dim": 8, "residual_dim": 4, "num_residual_blocks": 1}


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def small(preset: str = "rgb32", **overrides) -> tokenizer.Tokenizer:
    torch.manual_seed(0)
    return tokenizer.from_preset(preset, **{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("preset", "size", "grids"),
    [
        ("grey28", None, {"codes": (7, 7)}),
        ("grey28", 64, {"codes": (16, 16)}),
        ("rgb32", None, {"top": (4, 4), "bottom": (8, 8)}),
        ("rgb32", 48, {"top": (6, 6), "bottom": (12, 12)}),
        ("rgb256", 128, {"top": (16, 16), "bottom": (32, 32)}),
        ("rgb256", None, {"top": (32, 32), "bottom": (64, 64)}),
    ],
)
def test_grids_of_presets(preset, size, grids):
    model = tokenizer.from_preset(preset)
    side = model.config.size if size is None else size
    images = random_images(1, model.config.channels, side, side)
    codes = model.encode(images)
    assert {name: tuple(level.shape[1:]) for name, level in codes.items()} == grids
    assert {name: model.config.grid(name, size) for name in grids} == grids
    assert all(
        level.dtype == torch.int64 and 0 <= level.min() <= level.max() < model.config.codebook_size
        for level in codes.values()
    )
    assert model.decode(codes).shape == images.shape
    assert tuple(codes) == model.config.level_names


def test_decoding_codes_gives_the_reconstruction_of_the_forward_pass():
    for preset in ("grey28", "rgb32"):
        model = small(preset).eval()
        images = random_images(3, model.config.channels, 16, 16)
        result = model(model.prepare(images))
        codes = model.encode(images)
        assert all(torch.equal(codes[name], result.levels[name].codes) for name in codes)
        torch.testing.assert_close(model.decode(codes, torch.float32), result.images.clamp(-1, 1))
        decoded = model.decode(codes)
        assert decoded.dtype == torch.uint8
        torch.testing.assert_close(
            decoded / 127.5 - 1, model.decode(codes, torch.float32), atol=0.5 / 127.5 + 1e-6, rtol=0
        )


def test_training_mode_does_not_change_codes_and_nothing_needs_gradients():
    model = small()
    images = random_images(2, 3, 16, 16)
    first, second = model.train().encode(images), model.eval().encode(images)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not model.decode(first, torch.float32).requires_grad


def test_bytes_and_floats_give_the_same_codes():
    model = small()
    images = random_images(4, 3, 24, 24)
    from_bytes, from_floats = model.encode(images), model.encode(images.float() / 127.5 - 1)
    assert all(torch.equal(from_bytes[name], from_floats[name]) for name in from_bytes)


def test_pixels_survive_the_conversion_both_ways():
    model = small("grey28")
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(((model.prepare(every) + 1) * 127.5).round().to(torch.uint8), every)


def test_bottom_is_conditioned_on_the_decoded_top():
    model = small()
    images = random_images(1, 3, 16, 16)
    plain = model.encode(images)
    with torch.no_grad():
        model.quantizers["top"].codebook.mul_(-20)
    moved = model.encode(images)
    assert not torch.equal(plain["bottom"], moved["bottom"])


def test_both_levels_reach_the_pixels():
    model = small()
    codes = model.encode(random_images(1, 3, 16, 16))
    plain = model.decode(codes, torch.float32)
    for name in codes:
        changed = dict(codes)
        changed[name] = (codes[name] + 1) % 16
        assert not torch.equal(model.decode(changed, torch.float32), plain)


def test_sorting_keeps_reconstructions():
    model = small(start_step=1)
    step, generator = tokenizer.TokenizerStep(model), torch.Generator().manual_seed(0)
    images = random_images(8, 3, 16, 16)
    for _ in range(2):
        out = step({"images": images})
        step.update(out.sums, out.pools, generator)
    codes = model.encode(images)
    before = model.decode(codes, torch.float32)
    with torch.no_grad():  # so that there is something to reorder
        model.quantizers["top"].ema_counts.copy_(torch.arange(16))
    model.sort_by_usage()
    after = model.encode(images)
    assert torch.equal(after["top"], 15 - codes["top"])
    assert torch.equal(model.decode(after, torch.float32), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_any_integer_type_decodes(dtype):
    model = small("grey28")
    codes = model.encode(random_images(2, 1, 8, 8))
    assert torch.equal(model.decode({"codes": codes["codes"].to(dtype)}), model.decode(codes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": torch.full((1, 2, 2), 16)}, r"level 'top' holds code 16, but codebook_size is 16 \(valid 0..15\)"),
        ({"bottom": torch.full((1, 4, 4), -1)}, "holds code -1"),
        ({"top": torch.zeros(1, 2, 2)}, "expected integers"),
        ({"top": torch.zeros(2, 2, dtype=torch.int64)}, r"shape \[N, h, w\]"),
        ({"top": torch.zeros(1, 3, 2, dtype=torch.int64)}, "does not fit 'top'"),
        ({"top": torch.zeros(2, 2, 2, dtype=torch.int64)}, "does not fit 'top'"),
        ({"botom": torch.zeros(1, 2, 2, dtype=torch.int64)}, "Did you mean 'bottom'"),
    ],
)
def test_undecodable_codes_are_refused(change, message):
    codes = {"top": torch.zeros(1, 2, 2, dtype=torch.int64), "bottom": torch.zeros(1, 4, 4, dtype=torch.int64)}
    with pytest.raises(CodesError, match=message):
        small().decode({**codes, **change})


def test_missing_levels_and_other_dtypes_are_refused():
    with pytest.raises(CodesError, match="level top is missing"):
        small().decode({"bottom": torch.zeros(1, 4, 4, dtype=torch.int64)})
    with pytest.raises(CodesError, match="dtype: expected"):
        small("grey28").decode({"codes": torch.zeros(1, 4, 4, dtype=torch.int64)}, torch.float16)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_images(3, 16, 16), r"\[N, 3, H, W\]"),
        (random_images(1, 1, 16, 16), r"\[N, 3, H, W\]"),
        (random_images(1, 3, 16, 20), "multiples of 8"),
        (random_images(1, 3, 0, 8), "multiples of 8"),
        (random_images(1, 3, 16, 16).long(), "uint8"),
    ],
)
def test_unfit_images_are_refused(images, message):
    with pytest.raises(CodesError, match=message):
        small().encode(images)


def test_codebooks_are_not_parameters():
    model = small()
    names = {name for name, _ in model.named_parameters()}
    assert not any("quantizer" in name for name in names)
    assert model.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("value", [200.0, -1.5, float("nan"), float("inf")], ids=str)
def test_floats_that_are_no_pixels_are_refused(value):
    images = torch.zeros(2, 3, 16, 16)
    images[1, 0, 3, 5] = value
    with pytest.raises(CodesError, match=r"expected floats in \[-1, 1\], found .* give uint8"):
        small().encode(images)
