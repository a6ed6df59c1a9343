"""Options that nothing reads are refused; those that are read change what a user sees, and no others do."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch

from tokenizer import PRESETS, Tokenizer, TokenizerConfig, TokenizerStep, preset_config
from tokenizer.rules import RULES, refuse_unread
from vqmill import CodesError

SMALL = TokenizerConfig(
    channels=1, size=16, codebook_size=16, code_dim=8, hidden_dim=8, residual_dim=4, num_residual_blocks=1, start_step=2,
    revive_fraction=0.5, revive_after=1,
)  # fmt: skip
LEARNED = [
    replace(SMALL, quantizer=quantizer, codebook_start=start, revival=revival)
    for quantizer, start, revival in product(("ema", "gradient"), ("kmeans", "uniform"), ("rare", "unused", "none"))
]
FSQ = replace(SMALL, quantizer="fsq", fsq_levels=(4, 4), code_dim=2)
BARE = replace(SMALL, num_residual_blocks=0)
UNIXPICKLE = replace(SMALL, architecture="unixpickle", residual_dim=8)
GROUPED = replace(SMALL, architecture="grouped", num_groups=2, hidden_dim=16)
BASES = {
    f"{base.architecture} {base.num_residual_blocks} {base.quantizer} {base.codebook_start} {base.revival}": base
    for base in (*LEARNED, FSQ, BARE, UNIXPICKLE, GROUPED)
}
OTHER: dict[str, Any] = {  # a second value of every option that has a rule
    "fsq_levels": (2, 8),
    "num_quantizers": 2,
    "normalize": True,
    "rotation": True,
    "commitment_cost": 1.0,
    "ema_decay": 0.0,
    "codebook_start": "normal",
    "start_step": 1,
    "pool_size": 50,
    "revival": "none",
    "revive_fraction": 0.95,
    "revive_after": 3,
    "num_groups": 3,
    "residual_bias": False,
    "rectified_skip": True,
    "residual_dim": 6,
}


def observe(config: TokenizerConfig) -> tuple[object, ...]:
    """What a user sees of a short training: its losses, and the codes of some images in the end, by their final numbers."""
    torch.manual_seed(0)
    step = TokenizerStep(Tokenizer(config))
    with torch.no_grad():  # wide features, so that many codes are in use
        for name, weight in step.named_parameters():
            weight *= 1 if "codebook" in name else 1.7
    optimizer = torch.optim.SGD(step.parameters(), lr=0.003)
    images = torch.randint(0, 256, (7, 4, 1, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = (
        images // torch.tensor([1, 9, 3, 1, 20, 2, 5])[:, None, None, None, None]
    )  # each batch uses other codes most
    images = images.byte()
    losses = []
    for batch in images:
        out = step.train()({"images": batch})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.update(out.sums, out.pools, torch.Generator().manual_seed(len(losses)))
        losses.append(float(out.loss.detach()))
    model = step.tokenizer.eval()
    model.sort_by_usage()
    return losses, [codes.tolist() for codes in model.encode(images.flatten(0, 1)).values()]


def is_read(config: TokenizerConfig, name: str) -> bool:
    try:
        refuse_unread(config, [name])
    except CodesError:
        return False
    return True


def test_every_rule_is_tried():
    assert OTHER.keys() == {name for rule in RULES for name in rule.options}
    for rule in RULES:
        found = {rule.holds(base) for base in BASES.values()}
        assert found == {True, False}, rule


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_an_option_has_an_effect_where_it_is_not_refused_and_only_there(base):
    plain = observe(base)
    for name, value in OTHER.items():
        if getattr(base, name) == value:
            continue
        try:
            changed = replace(base, **{name: value})
        except CodesError:
            continue  # the two do not go together, and the configuration says so itself
        if is_read(changed, name):
            assert observe(changed) != plain, name
        else:
            assert observe(changed) == plain, name


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("fsq32", {"commitment_cost": 0.3}, "commitment_cost: .*quantizer = 'ema' or 'gradient'; found quantizer = 'fsq'"),
        ("fsq32", {"revive_after": 3}, "revive_after: .*quantizer = 'ema' or 'gradient'"),
        ("fsq32", {"normalize": False}, "normalize: .*quantizer = 'ema' or 'gradient'"),
        ("grey28", {"fsq_levels": ()}, "fsq_levels: .*quantizer = 'fsq'; found quantizer = 'ema'"),
        ("zalando_cifar", {"start_step": 50}, "start_step: .*codebook_start = 'kmeans'; found codebook_start = 'uniform'"),
        ("zalando_cifar", {"revive_fraction": 0.2}, "revive_fraction: .*revival = 'rare'; found revival = 'none'"),
        ("grey28", {"revive_after": 100}, "revive_after: .*revival = 'unused'; found revival = 'rare'"),
        ("nngen_mnist", {"pool_size": 4096}, "codebook_start = 'kmeans', or revival = 'rare' or 'unused'; found codebook_start"),
        ("grey28", {"num_groups": 0}, "num_groups: .*architecture = 'grouped'; found architecture = 'strided'"),
        ("dalle64", {"residual_bias": True}, "residual_bias: .*architecture = 'strided'"),
        ("unixpickle_256", {"rectified_skip": False}, "rectified_skip: .*architecture = 'strided'"),
        ("grey28", {"num_residual_blocks": 0, "residual_dim": 8}, r"residual_dim: .*num_residual_blocks in 1\.\.64"),
        ("grey28", {"num_residual_blocks": 0, "residual_bias": False}, r"residual_bias: .*num_residual_blocks in 1\.\.64"),
    ],
    ids=str,
)  # fmt: skip
def test_options_given_in_vain_are_refused(preset, options, message):
    with pytest.raises(CodesError, match=message):
        preset_config(preset, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_s_own_values_and_defaults_are_not_given(preset):
    assert preset_config(preset).preset == preset
    assert preset_config("zalando_cifar", num_residual_blocks=0).residual_bias is False
    assert preset_config("unixpickle_256", revival="rare").revive_after == 100
    read = [field.name for field in fields(TokenizerConfig) if is_read(preset_config(preset), field.name)]
    assert set(PRESETS[preset]) <= set(read), "what a preset says is read, too"


def test_what_makes_an_option_meaningful_may_come_with_it():
    config = preset_config("zalando_cifar", codebook_start="kmeans", start_step=7, revival="rare", revive_fraction=0.1)
    assert (config.start_step, config.revive_fraction) == (7, 0.1)
