"""Configuration: every field matters, nothing wrong gets in, nothing is lost on the way to JSON."""

import json
from dataclasses import fields, replace

import pytest
import torch

from priors import (
    PRESETS,
    GPTConfig,
    LevelShape,
    PixelCNNConfig,
    Prior,
    PriorConfig,
    PriorStep,
    from_preset,
    preset_config,
)
from vqmill.errors import CodesError

LEVELS = (LevelShape("top", 5, (2, 2)), LevelShape("bottom", 6, (4, 4)))
NETWORK = PixelCNNConfig(depth=8, num_layers=2, dropout=0.0, label_dropout=0.0)
GPT = GPTConfig(depth=8, num_layers=1, num_heads=2, dropout=0.0, label_dropout=0.0)
BASE = PriorConfig(LEVELS, (NETWORK, NETWORK), 3, "tok")
OTHER_VALUES = {
    "levels": (LEVELS[0], LevelShape("bottom", 7, (4, 4))),
    "networks": (NETWORK, GPT),
    "num_classes": 4,
}
OTHER_SIZES = {
    "depth": 12,
    "num_layers": 3,
    "horizontal": 2,
    "vertical": 2,
    "norm": False,
    "vertical_residual": False,
    "position": False,
    "attention_every": 1,
    "num_heads": 4,
    "num_output_blocks": 2,
    "num_condition_blocks": 1,
    "dropout": 0.5,
    "label_dropout": 0.9,
}


def trace(config):
    """What a training step of the finer level makes of a fixed batch."""
    torch.manual_seed(0)
    prior = Prior(config)
    with torch.no_grad():
        for parameter in prior.parameters():  # far from the small numbers of the start, where attention hardly matters
            parameter.mul_(4)
    batch = {"top": torch.arange(16).view(4, 2, 2) % 5, "bottom": torch.arange(64).view(4, 4, 4) % 6}
    loss = PriorStep(prior, "bottom")(batch | {"label": torch.tensor([0, 1, 2, 0])}).loss
    shapes = {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()}
    return shapes, loss.item()


@pytest.mark.parametrize("field", [field.name for field in fields(PriorConfig)])
def test_every_field_has_an_effect(field):
    if field in ("tokenizer_fingerprint", "preset"):  # records: they show in the fingerprint
        changed = replace(BASE, **{field: "other"})
        torch.manual_seed(0)
        prior = Prior(BASE)
        former = prior.fingerprint
        prior.config = changed
        assert prior.fingerprint != former
    else:
        assert trace(replace(BASE, **{field: OTHER_VALUES[field]})) != trace(BASE)
        assert trace(BASE) == trace(BASE)


@pytest.mark.parametrize(
    ("network", "field"), [(network, field.name) for network in (NETWORK, GPT) for field in fields(network)],
    ids=lambda value: getattr(value, "kind", value),
)  # fmt: skip
def test_every_size_has_an_effect(network, field):
    if field == "num_heads":
        network = replace(network, **{"attention_every": 2} if network.kind == "pixelcnn" else {"num_layers": 2})
    changed = replace(network, **{field: OTHER_SIZES[field]})
    assert trace(replace(BASE, networks=(NETWORK, changed))) != trace(replace(BASE, networks=(NETWORK, network)))


@pytest.mark.parametrize("networks", [(NETWORK, NETWORK), (GPT, NETWORK)], ids=["alike", "mixed"])
def test_json_round_trip(networks):
    config = replace(BASE, networks=networks)
    assert PriorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_are_recorded(name):
    prior = from_preset(name, LEVELS, 3, "tok", num_layers=1)
    assert prior.config.preset == name
    assert [network.num_layers for network in prior.config.networks] == [1, 1]
    assert prior.levels == ("top", "bottom")


def test_a_level_can_have_sizes_of_its_own():
    top, bottom = preset_config("razavi", LEVELS, 3, "tok", depth=16, bottom={"num_layers": 2, "depth": 8}).networks
    assert (top.depth, top.num_layers, top.attention_every, top.num_condition_blocks) == (16, 20, 5, 2)
    assert (bottom.depth, bottom.num_layers, bottom.attention_every, bottom.num_condition_blocks) == (8, 2, 0, 20)
    with pytest.raises(CodesError, match="level 'botom': the levels are 'top', 'bottom'"):
        preset_config("pixelcnn", LEVELS, 3, "tok", botom={"depth": 8})
    with pytest.raises(CodesError, match="'kind': it is the preset's, here pixelcnn"):
        preset_config("pixelcnn", LEVELS, 3, "tok", kind="gpt")


@pytest.mark.parametrize(
    ("num_classes", "options", "message"),
    [
        (3, {"num_heads": 2}, "level 'top' has no attention"),
        (3, {"bottom": {"num_heads": 2}, "top": {"attention_every": 1}}, "level 'bottom' has no attention"),
        (3, {"top": {"num_condition_blocks": 1}}, "level 'top' is the coarsest"),
        (0, {"label_dropout": 0.2}, "there are no labels to hide"),
        (0, {"bottom": {"label_dropout": 0.2}}, "there are no labels to hide"),
    ],
)
def test_options_that_nothing_reads_are_refused(num_classes, options, message):
    with pytest.raises(CodesError, match=message):
        preset_config("pixelcnn", LEVELS, num_classes, "tok", **options)


def test_options_that_one_level_reads_are_taken():
    preset_config("pixelcnn", LEVELS, 3, "tok", num_condition_blocks=1, num_heads=2, attention_every=1)
    preset_config("gpt", LEVELS, 3, "tok", num_heads=2, bottom={"num_condition_blocks": 1})
    with pytest.raises(CodesError, match="prior option 'levels': expected one of depth"):
        preset_config("pixelcnn", LEVELS, 3, "tok", levels=3)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(CodesError, match="Did you mean 'pixelcnn'"):
        from_preset("pixelcn", LEVELS, 3, "tok")
    with pytest.raises(CodesError, match="Did you mean 'dropout'"):
        from_preset("pixelcnn", LEVELS, 3, "tok", dropuot=0.1)
    with pytest.raises(CodesError, match=r"unknown key 'deepth'.*Did you mean 'depth'"):
        PriorConfig.from_dict(BASE.to_dict() | {"networks": [NETWORK.to_dict() | {"deepth": 3}] * 2})
    with pytest.raises(CodesError, match="missing num_classes"):
        PriorConfig.from_dict({key: value for key, value in BASE.to_dict().items() if key != "num_classes"})
    with pytest.raises(CodesError, match="a kind out of pixelcnn, gpt, found 'lstm'"):
        PriorConfig.from_dict(BASE.to_dict() | {"networks": [{"kind": "lstm"}] * 2})
    with pytest.raises(CodesError, match="Did you mean 'top'"):
        Prior(BASE).level_prior("topp")


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": ()},
        {"levels": (LEVELS[0], LEVELS[0])},
        {"levels": (LEVELS[1], LEVELS[0])},
        {"levels": (LEVELS[0], LevelShape("bottom", 6, (5, 4)))},
        {"levels": tuple(LevelShape(f"level{number}", 5, (2, 2)) for number in range(9))},
        {"networks": (NETWORK,)},
        {"num_classes": -1},
        {"num_classes": True},
        {"num_classes": 10**9},
        {"preset": 3},
        {"tokenizer_fingerprint": None},
    ],
)
def test_bad_values_are_refused(wrong):
    with pytest.raises(CodesError, match=next(iter(wrong))):
        replace(BASE, **wrong)


@pytest.mark.parametrize(
    ("network", "wrong"),
    [
        (NETWORK, {"depth": 0}),
        (NETWORK, {"depth": 8.0}),
        (NETWORK, {"horizontal": 0}),
        (NETWORK, {"num_layers": -1}),
        *((NETWORK, {field.name: 10**9}) for field in fields(NETWORK)),
        (NETWORK, {"norm": 1}),
        (NETWORK, {"dropout": 1.0}),
        (NETWORK, {"dropout": float("nan")}),
        (NETWORK, {"label_dropout": -0.1}),
        (NETWORK, {"num_heads": 3, "attention_every": 1}),
        (GPT, {"num_heads": 3}),
    ],
)
def test_bad_sizes_are_refused(network, wrong):
    with pytest.raises(CodesError, match=next(iter(wrong))):
        replace(network, **wrong)


@pytest.mark.parametrize(
    "shape",
    [
        ("", 5, (2, 2)),
        (3, 5, (2, 2)),
        ("top", 0, (2, 2)),
        ("top", 10**9, (2, 2)),
        ("top", 5, (2,)),
        ("top", 5, (2, 0)),
        ("top", 5, (2, 10**9)),
        ("top", 5, 3),
        ("top", 5, None),
        ("top", 5, "ab"),
    ],
)
def test_bad_levels_are_refused(shape):
    with pytest.raises(CodesError, match=r"level|grid"):
        LevelShape(*shape)


@pytest.mark.parametrize("value", [None, 3, 1.5, True, "ab", {}, {"top": 1}, [], [None], [3], ["top"], [[]], [{}]])
@pytest.mark.parametrize("key", BASE.to_dict())
def test_other_kinds_of_values_are_refused_and_nothing_else_is_raised(key, value):
    try:
        PriorConfig.from_dict(BASE.to_dict() | {key: value})
    except CodesError:
        return
    assert key not in ("levels", "networks")
    assert isinstance(value, type(BASE.to_dict()[key]))


def test_another_tokenizer_is_refused_by_name():
    BASE.check_tokenizer("tok")
    with pytest.raises(CodesError, match=r"tokenizer tok, but was given tokenizer zzz"):
        BASE.check_tokenizer("zzz")
