"""Configurations: strict, with helpful errors, and every field has an effect."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from tokenizer import PRESETS, Tokenizer, TokenizerConfig, TokenizerStep, from_preset
from vqmill import CodesError

SMALL = TokenizerConfig(
    channels=1, size=16, codebook_size=16, code_dim=8, hidden_dim=8, residual_dim=4, num_residual_blocks=1, start_step=2
)
UNUSED = replace(SMALL, revival="unused", codebook_start="normal")
FSQ = replace(SMALL, quantizer="fsq", fsq_levels=(4, 4), codebook_size=16, code_dim=2)
WIDE = replace(SMALL, hidden_dim=16, residual_dim=4)  # sizes that `grouped` takes too
EQUAL = replace(SMALL, hidden_dim=8, residual_dim=8, code_dim=8)  # and `unixpickle`


def observe(config: TokenizerConfig) -> dict[str, object]:
    """All that a user can see of a configuration after three steps of training."""
    torch.manual_seed(0)
    step, generator = TokenizerStep(Tokenizer(config)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    losses, pools = [], []
    for seed in range(4):
        frames = () if config.frames == 1 else (config.frames,)
        shape = (4, *frames, config.channels, 32, 32)
        images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        out = step({"images": images})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.update(out.sums, out.pools, generator)
        losses.append(round(float(out.loss.detach()), 6))
        pools.append([tuple(pool.shape) for pool in out.pools.values()])
    return {
        "losses": losses,
        "pools": pools,
        "parameters": step.tokenizer.num_parameters,
        "state": {name: round(float(t.double().abs().sum()), 4) for name, t in step.state_dict().items()},
        "grids": [config.grid(name) for name in config.level_names],
        "fingerprint of untrained": None if config.preset == SMALL.preset else Tokenizer(config).fingerprint,
    }


# field: where it is tried, and what else it is set to
OTHER = {
    "preset": (SMALL, {"preset": "mine"}),
    "architecture": (WIDE, {"architecture": "grouped", "num_groups": 3}),
    "channels": (SMALL, {"channels": 3}),
    "size": (SMALL, {"size": 32}),
    "frames": (SMALL, {"frames": 2}),
    "num_levels": (SMALL, {"num_levels": 2}),
    "hidden_dim": (SMALL, {"hidden_dim": 12}),
    "residual_dim": (SMALL, {"residual_dim": 8}),
    "num_residual_blocks": (SMALL, {"num_residual_blocks": 2}),
    "residual_bias": (SMALL, {"residual_bias": False}),
    "rectified_skip": (SMALL, {"rectified_skip": True}),
    "num_groups": (replace(WIDE, architecture="grouped", num_groups=2), {"num_groups": 3}),
    "quantizer": (SMALL, {"quantizer": "gradient"}),
    "codebook_size": (SMALL, {"codebook_size": 32}),
    "code_dim": (SMALL, {"code_dim": 4}),
    "fsq_levels": (FSQ, {"fsq_levels": (2, 8)}),
    "num_quantizers": (SMALL, {"num_quantizers": 2}),
    "normalize": (SMALL, {"normalize": True}),
    "rotation": (SMALL, {"rotation": True}),
    "codebook_start": (SMALL, {"codebook_start": "uniform"}),
    "start_step": (SMALL, {"start_step": 1}),
    "revival": (replace(SMALL, revive_fraction=0.9), {"revival": "none"}),
    "revive_fraction": (SMALL, {"revive_fraction": 0.9}),
    "revive_after": (UNUSED, {"revive_after": 2}),
    "pool_size": (SMALL, {"pool_size": 100}),
    "commitment_cost": (SMALL, {"commitment_cost": 1.0}),
    "ema_decay": (SMALL, {"ema_decay": 0.5}),
    "loss": (SMALL, {"loss": "l1"}),
    "pixel_range": (SMALL, {"pixel_range": (0.0, 1.0)}),
}
CHOSEN = [  # every choice of a field that has choices differs from every other one
    (EQUAL, "architecture", ({}, {"architecture": "unixpickle"})),
    (SMALL, "codebook_start", ({}, {"codebook_start": "uniform"}, {"codebook_start": "normal"})),
    (UNUSED, "revival", ({"revive_after": 2}, {"revival": "none"}, {"revival": "rare"})),
    (SMALL, "loss", ({}, {"loss": "l1"}, {"loss": "log_laplace"})),
]


def test_every_field_is_tried():
    assert OTHER.keys() == {field.name for field in fields(TokenizerConfig)}


@pytest.mark.parametrize("name", OTHER)
def test_every_field_has_an_effect(name):
    base, change = OTHER[name]
    assert observe(replace(base, **change)) != observe(base)


@pytest.mark.parametrize(("base", "name", "changes"), CHOSEN, ids=[name for _, name, _ in CHOSEN])
def test_choices_differ_from_each_other(base, name, changes):
    seen = [observe(replace(base, **change)) for change in changes]
    assert all(one != other for place, one in enumerate(seen) for other in seen[:place])


def test_same_configuration_is_observed_the_same():
    assert observe(SMALL) == observe(SMALL)


def test_dictionary_round_trip():
    for name, values in PRESETS.items():
        config = TokenizerConfig(preset=name, **values)
        assert TokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dictionaries_are_strict():
    values = SMALL.to_dict()
    with pytest.raises(CodesError, match=r"'codebook_sizes'.*Did you mean 'codebook_size'"):
        TokenizerConfig.from_dict(values | {"codebook_sizes": 3})
    del values["code_dim"]
    with pytest.raises(CodesError, match=r"lacks code_dim\. If an earlier version of vqmill wrote it, train it again"):
        TokenizerConfig.from_dict(values)


def test_unknown_presets_and_options_name_the_nearest():
    with pytest.raises(CodesError, match=r"grey28, rgb32, rgb256, .*Did you mean 'grey28'"):
        from_preset("gray28")
    with pytest.raises(CodesError, match="Did you mean 'ema_decay'"):
        from_preset("grey28", ema_decya=0.9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 2),
        ("channels", 4),
        ("size", 30),
        ("size", 0),
        ("codebook_size", 1),
        ("codebook_size", 16.0),
        ("codebook_size", True),
        ("hidden_dim", 7),
        ("num_levels", 9),
        ("frames", 0),
        ("num_groups", 3),
        ("num_quantizers", 0),
        ("revive_after", 0),
        ("residual_bias", 1),
        ("rectified_skip", "yes"),
        ("normalize", None),
        ("rotation", "no"),
        ("architecture", "stridd"),
        ("quantizer", "vq"),
        ("codebook_start", ["kmeans"]),
        ("revival", True),
        ("loss", "MSE"),
        ("pixel_range", (1.0, 0.0)),
        ("pixel_range", 3),
        ("fsq_levels", 8),
        ("num_residual_blocks", -1),
        ("num_residual_blocks", 10**9),
        ("commitment_cost", -0.1),
        ("commitment_cost", float("inf")),
        ("commitment_cost", float("nan")),
        ("ema_decay", 1.0),
        ("ema_decay", "0.9"),
        ("start_step", 0),
        ("revive_fraction", 1.0),
        ("pool_size", 0),
        ("preset", 3),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(CodesError, match=f"^{name}: expected"):
        replace(SMALL, **{name: value})


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (SMALL, {"fsq_levels": (4, 4)}, "fsq_levels: only for quantizer = 'fsq', which is 'ema'"),
        (SMALL, {"quantizer": "fsq"}, r"fsq_levels: quantizer = 'fsq' needs them"),
        (FSQ, {"codebook_size": 17}, r"expected codebook_size 16 .* and code_dim 2 .*found 17 and 2"),
        (FSQ, {"fsq_levels": (16, 1)}, r"fsq_levels: expected a whole number in 2\.\.1024, found 1"),
        (FSQ, {"rotation": True}, "'fsq' has no normalize, rotation or num_quantizers"),
        (SMALL, {"num_quantizers": 2, "normalize": True}, "Choose one of the two"),
        (SMALL, {"architecture": "grouped"}, "num_groups: expected 2 or more for architecture 'grouped'"),
        (
            SMALL,
            {"architecture": "unixpickle"},
            "expected hidden_dim, residual_dim and code_dim to be equal, found 8, 4 and 8",
        ),
        (EQUAL, {"architecture": "unixpickle", "residual_bias": False}, "residual_bias: only 'strided'"),
        (
            EQUAL,
            {"architecture": "unixpickle", "rectified_skip": True},
            "rectified_skip: only for architecture 'strided'",
        ),
        (OTHER["num_groups"][0], {"num_levels": 2}, "'grouped' has one level"),
        (OTHER["num_groups"][0], {"residual_dim": 8}, "a quarter of hidden_dim, found 8 and 16"),
        (SMALL, {"loss": "log_laplace", "pixel_range": (0, 1)}, "pixel_range: loss 'log_laplace'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_values_that_do_not_go_together_are_refused(base, changes, message):
    with pytest.raises(CodesError, match=message):
        replace(base, **changes)


def test_lists_of_files_become_tuples():
    config = TokenizerConfig.from_dict({**FSQ.to_dict(), "fsq_levels": [2, 8]})
    assert config.fsq_levels == (2, 8)
    assert hash(config) != hash(FSQ)


def test_three_levels_and_more_have_names():
    assert replace(SMALL, num_levels=3).level_names == ("top", "middle", "bottom")
    four = replace(SMALL, num_levels=4, size=32)
    assert four.level_names == ("top", "middle1", "middle2", "bottom")
    assert [four.grid(name) for name in four.level_names] == [(1, 1), (2, 2), (4, 4), (8, 8)]


def test_grids_of_other_kinds():
    assert replace(SMALL, num_quantizers=3).grid("codes") == (3, 4, 4)
    grouped = OTHER["num_groups"][0]
    assert (grouped.downsample, grouped.grid("codes")) == (2, (8, 8))


def test_grids():
    one, two = SMALL, replace(SMALL, num_levels=2)
    assert (one.level_names, one.downsample, one.grid("codes"), one.grid("codes", 64)) == (
        ("codes",),
        4,
        (4, 4),
        (16, 16),
    )
    assert (two.level_names, two.downsample) == (("top", "bottom"), 8)
    assert (two.grid("top"), two.grid("bottom"), two.grid("top", 64)) == ((2, 2), (4, 4), (8, 8))
    with pytest.raises(CodesError, match="multiple of 8"):
        two.grid("top", 20)
    with pytest.raises(CodesError, match="Did you mean 'top'"):
        two.grid("tops")


def test_a_k_means_start_needs_as_many_features_as_codes():
    with pytest.raises(CodesError, match="pool_size: expected codebook_size, 512, or more"):
        TokenizerConfig(codebook_size=512, pool_size=511)
    assert TokenizerConfig(codebook_size=512, pool_size=100, codebook_start="normal").pool_size == 100
