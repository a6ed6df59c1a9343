"""Imported weights give the codes and the pixels that their own networks give; whatever does not fit is named."""

from __future__ import annotations

import pytest
import torch

from tokenizer.imports import LAYOUTS, convert, unwrap
from vqmill.errors import CodesError

SOURCES = {
    "zalando": lambda p: p.Zalando(),
    "zalando-gradient": lambda p: p.Zalando(ema=False, hidden=12, dim=3, blocks=1, size=300),
    "zalando-shared": lambda p: p.Zalando(shared=True, blocks=3),
    "zalando-bias": lambda p: p.Zalando(bias=True, channels=1, inner=7),
    "zalando-no-blocks": lambda p: p.Zalando(blocks=0),
    "rosinality": lambda p: p.Rosinality(),
    "rosinality-other": lambda p: p.Rosinality(channels=1, hidden=12, inner=6, blocks=1, dim=7, size=300),
    "rosinality-no-bias": lambda p: p.Rosinality(bias=False),
    "unixpickle": lambda p: p.Unixpickle(),
    "unixpickle-one-level": lambda p: p.Unixpickle(levels=1, channels=1, hidden=6),
}


@pytest.fixture
def source(published):
    def make(name):
        """A published network with random weights, large ones, so that different images have different codes."""
        torch.manual_seed(7)
        network = SOURCES[name](published).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter *= 3 if parameter.ndim == 4 else 1
        return network

    return make


def agree(model, theirs, low, high):
    """Compares codes and pixels; the source sees pixels in [low, high]."""
    torch.manual_seed(1)
    images = torch.randint(0, 256, (5, model.config.channels, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.encode(images / 255 * (high - low) + low)
        pixels = ((theirs.decode(expected) - low) / (high - low) * 2 - 1).clamp(-1, 1)
    codes = model.encode(images)
    assert codes.keys() == expected.keys()
    for level, found in codes.items():
        assert torch.equal(found, expected[level])
        assert len(found.unique()) > 1, "these weights would not show a difference"
    assert (pixels.abs() < 1).float().mean() > 0.1, "nor would these"
    torch.testing.assert_close(model.decode(expected, dtype=torch.float32), pixels, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_codes_and_pixels_are_those_of_the_source(source, name):
    theirs, layout = source(name), name.partition("-")[0]
    model = convert(theirs.state_dict(), layout)
    agree(model, theirs, *LAYOUTS[layout].pixel_range)
    assert model.config.preset == f"imported-{layout}"
    assert not model.training


def test_the_pixel_range_is_that_of_the_training(source):
    theirs = source("zalando")
    earlier = convert(theirs.state_dict(), "zalando", pixel_range=(-1, 1), size=64)
    agree(earlier, theirs, -1, 1)
    assert (earlier.config.size, earlier.config.pixel_range) == (64, (-1.0, 1.0))


def test_codebook_statistics_come_along(source):
    theirs = source("zalando").state_dict()
    ours = convert(theirs, "zalando").quantizers["codes"].state_dict()
    assert torch.equal(ours["codebook"], theirs["_vq_vae._embedding.weight"])
    assert torch.equal(ours["ema_counts"], theirs["_vq_vae._ema_cluster_size"])
    assert torch.equal(ours["ema_sums"], theirs["_vq_vae._ema_w"])
    theirs = source("rosinality").state_dict()
    ours = convert(theirs, "rosinality").quantizers["top"].state_dict()
    assert torch.equal(ours["codebook"], theirs["quantize_t.embed"].T)
    assert torch.equal(ours["ema_sums"], theirs["quantize_t.embed_avg"].T)


def test_unixpickle_counts_down_where_we_count_up(source):
    theirs = source("unixpickle").state_dict()
    model = convert(theirs, "unixpickle")
    assert (model.config.revival, model.config.revive_after) == ("unused", 100)
    idle = model.quantizers["top"].state_dict()["idle_updates"]
    assert torch.equal(idle, 100 - theirs["encoder_1.vq.usage_count"])


def test_a_copy_is_made(source):
    theirs = source("zalando").state_dict()
    model = convert(theirs, "zalando")
    before = model.fingerprint
    theirs["_pre_vq_conv.weight"].zero_()
    assert model.fingerprint == before


def test_half_precision_is_widened(source):
    theirs = {name: tensor.half() for name, tensor in source("rosinality").state_dict().items()}
    assert {tensor.dtype for tensor in convert(theirs, "rosinality").parameters()} == {torch.float32}


def test_wrappings_are_taken_off_and_said(source):
    state = source("zalando").state_dict()
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    found, notes = unwrap({"epoch": 3, "model": parallel, "optimizer": {}})
    assert found.keys() == state.keys()
    assert notes == [
        "the weights lay under 'model'; left aside: epoch, optimizer",
        "the prefix 'module.' was taken off every name",
    ]
    lightning = {"state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}}
    assert unwrap(lightning)[0].keys() == state.keys()
    assert unwrap({"model_state_dict": state}) == (state, ["the weights lay under 'model_state_dict'"])
    assert unwrap(state) == (state, [])


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ([1, 2], "expected a state dict"),
        ({}, "expected a state dict"),
        ({"a": 3}, "'a': expected a tensor, found int"),
        ({"net": {}, "epoch": 3}, "alone or under state_dict, model_state_dict, model; here are 'net', 'epoch'"),
        ({3: torch.zeros(1)}, "3: expected a tensor"),
    ],
    ids=["list", "empty", "number", "elsewhere", "key"],
)
def test_what_holds_no_weights_is_refused(loaded, message):
    with pytest.raises(CodesError, match=message):
        unwrap(loaded)


def test_a_circle_ends():
    circle = {}
    circle["model"] = circle
    with pytest.raises(CodesError, match="expected a tensor"):
        unwrap(circle)


def broken(state, name, change):
    """The state dict with one tensor changed, or gone when the change gives None."""
    state = dict(state)
    new = change(state.pop(name, None))
    return state if new is None else state | {name: new}


CONV = "_encoder._conv_2.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("_pre_vq_conv.bias", lambda old: None, r"expected \d+ tensors of layout 'zalando' at these sizes, found \d+: 1 are missing: '_pre_vq_conv.bias'\. Save the whole"),
        (CONV, lambda old: None, f"tensor '{CONV}' is missing, which its sizes are read off. Did you mean '_encoder._conv_"),
        (CONV, lambda old: old[:, :3], rf"tensor '{CONV}': expected floats of shape \[8, 4, 4, 4\], found torch.float32 \[8, 3, 4, 4\]"),
        (CONV, lambda old: old[0], "expected 4 dimensions"),
        (CONV, lambda old: old.long(), "expected floats"),
        (CONV, lambda old: old * float("nan"), f"tensor '{CONV}' holds NaN or infinity"),
        (CONV, lambda old: torch.zeros(1).expand(8, 4, 4, 4), "holds 4 bytes"),
        (CONV, lambda old: old.to_sparse(), "expected a plain tensor"),
        ("_vq_vae._ema_w", lambda old: None, "1 are missing: '_vq_vae._ema_w'"),
        ("loss.scale", lambda old: torch.zeros(2), r"1 do not belong to it: 'loss.scale' \(the first of shape \[2\]\)\. Rename"),
        ("_vq_vae._embedding.weight", lambda old: None, "is missing, which every checkpoint of layout 'zalando' has"),
    ],
    ids=["no-bias", "gone", "narrow", "flat", "integers", "nan", "pretended", "sparse", "half-ema", "extra", "mark"],
)  # fmt: skip
def test_what_does_not_fit_is_named(source, name, change, message):
    with pytest.raises(CodesError, match=message):
        convert(broken(source("zalando").state_dict(), name, change), "zalando")


def test_another_layout_is_recognised(source):
    with pytest.raises(CodesError, match="It looks like 'rosinality'"):
        convert(source("rosinality").state_dict(), "zalando")
    with pytest.raises(
        CodesError, match=r"zalando \('_vq_vae\._embedding\.weight'\), unixpickle .* its tensors are 'a'\."
    ):
        convert({"a": torch.zeros(1)}, "zalando")
    with pytest.raises(CodesError, match="Did you mean 'zalando'"):
        convert({}, "zalandoo")


def test_other_names_and_prefixes_are_recognised(source):
    state = source("rosinality").state_dict()
    renamed = {name.replace("quantize_conv_t", "quant_conv_t"): tensor for name, tensor in state.items()}
    message = r"2 are missing: 'quantize_conv_t\.weight', .* Did you mean 'quant_conv_t\.weight'\? 2 do not belong to it: 'quant_conv_t"
    with pytest.raises(CodesError, match=message):
        convert(renamed, "rosinality")
    mark = broken(state, "quantize_t.embed", lambda old: None) | {"quantize_t.embeds": state["quantize_t.embed"]}
    with pytest.raises(CodesError, match=r"Did you mean 'quantize_t\.embeds'\?"):
        convert(mark, "rosinality")
    inside = {f"vqvae.{name}": tensor for name, tensor in state.items()} | {"discriminator.weight": torch.zeros(2)}
    with pytest.raises(CodesError, match=r"Below the prefix 'vqvae\.' it looks like 'rosinality'"):
        convert(inside, "zalando")


def test_unixpickle_usage_must_be_counts_and_levels_few(source):
    state = source("unixpickle").state_dict()
    with pytest.raises(CodesError, match="usage_count': expected whole numbers"):
        convert(broken(state, "encoder_0.vq.usage_count", lambda old: old.float()), "unixpickle")
    with pytest.raises(CodesError, match="3 encoders: expected 1 or 2"):
        convert(state | {"encoder_2.vq.dictionary": torch.zeros(2, 8)}, "unixpickle")
