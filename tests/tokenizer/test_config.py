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


def observe(config: TokenizerConfig) -> dict[str, object]:
    """All that a user can see of a configuration after three steps of training."""
    torch.manual_seed(0)
    step, generator = TokenizerStep(Tokenizer(config)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    losses, pools = [], []
    for seed in range(4):
        shape = (4, config.channels, 32, 32)
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
        "codebooks": [round(float(q.codebook.abs().sum()), 4) for q in step.tokenizer.quantizers.values()],
        "grids": [config.grid(name) for name in config.level_names],
        "fingerprint of untrained": None if config.preset == SMALL.preset else Tokenizer(config).fingerprint,
    }


OTHER = {
    "preset": "mine",
    "channels": 3,
    "size": 32,
    "codebook_size": 32,
    "code_dim": 4,
    "hidden_dim": 12,
    "residual_dim": 8,
    "num_residual_blocks": 2,
    "num_levels": 2,
    "commitment_cost": 1.0,
    "ema_decay": 0.5,
    "start_step": 1,
    "revive_fraction": 0.9,
    "pool_size": 100,
}


def test_every_field_is_tried():
    assert OTHER.keys() == {field.name for field in fields(TokenizerConfig)}


@pytest.mark.parametrize("name", OTHER)
def test_every_field_has_an_effect(name):
    assert observe(replace(SMALL, **{name: OTHER[name]})) != observe(SMALL)


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
    with pytest.raises(CodesError, match="lacks code_dim"):
        TokenizerConfig.from_dict(values)


def test_unknown_presets_and_options_name_the_nearest():
    with pytest.raises(CodesError, match=r"grey28, rgb32, rgb256.*Did you mean 'grey28'"):
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
        ("num_levels", 3),
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
