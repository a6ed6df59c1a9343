"""Named sizes of priors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from priors.config import LevelShape, PriorConfig
from priors.network_config import KINDS, PixelCNNConfig
from vqmill.errors import CodesError
from vqmill.settings import did_you_mean


@dataclass(frozen=True)
class Preset:
    """What the networks of a prior are like.

    Attributes:
        kind: a key of `KINDS`.
        every: values for fields of each level's network.
        finer: values that levels below the coarsest have instead.
    """

    kind: str
    every: Mapping[str, Any]
    finer: Mapping[str, Any] = field(default_factory=dict)


# A training step of 64 samples on two CPU cores: tiny 0.04 s on an 8x8 grid; pixelcnn 0.15 s on 7x7, 0.07 s on 4x4 and 0.25 s on 8x8
# under 4x4; large 0.8 s on 7x7. The reach of one layer is 1: the layers make it up, and small kernels cost less per layer.
PRESETS = {
    "pixelcnn-tiny": Preset("pixelcnn", {"depth": 32, "num_layers": 4, "dropout": 0.0}),
    "pixelcnn": Preset("pixelcnn", {}),
    "pixelcnn-large": Preset(
        "pixelcnn", {"depth": 128, "num_layers": 14, "num_output_blocks": 2, "num_condition_blocks": 4}
    ),
    # Razavi et al. 2019, for grids of 32 x 32 under 64 x 64: 20 layers of 512, four of the top's followed by attention. There residual
    # blocks are wider inside (2,048 and 1,024 units); here they have the width of the layers.
    "razavi": Preset(
        "pixelcnn",
        {"depth": 512, "num_layers": 20, "horizontal": 2, "vertical": 2, "attention_every": 5, "num_output_blocks": 20},
        {"attention_every": 0, "num_condition_blocks": 20},
    ),
    "gpt-tiny": Preset("gpt", {"depth": 32, "num_layers": 3, "dropout": 0.0}),
    "gpt": Preset("gpt", {}),
    "gpt-large": Preset("gpt", {"depth": 512, "num_layers": 12, "num_heads": 8, "num_condition_blocks": 4}),
}


def preset_config(
    name: str, levels: Iterable[LevelShape], num_classes: int, tokenizer_fingerprint: str, /, **overrides: Any
) -> PriorConfig:
    """The configuration of a preset for given grids.

    Args:
        name: a key of `PRESETS`.
        levels: the grids of codes, coarse to fine.
        num_classes: labels lie in [0, num_classes); 0 for a prior that takes no label.
        tokenizer_fingerprint: the tokenizer whose codes are modelled.
        **overrides: other values for fields of the networks; under the name of a level, a mapping of values for that level alone.

    Raises:
        CodesError: unknown preset, level or field (the nearest name is suggested), or a value out of its range.
    """
    if name not in PRESETS:
        raise CodesError(f"prior preset '{name}': expected one of {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}")
    preset, shapes = PRESETS[name], tuple(levels)
    own = {key: value for key, value in overrides.items() if isinstance(value, Mapping)}
    if unknown := [key for key in own if key not in [shape.name for shape in shapes]]:
        known = ", ".join(repr(shape.name) for shape in shapes)
        raise CodesError(f"prior options for level '{unknown[0]}': the levels are {known}.")
    _check_read(overrides, own, shapes, num_classes)
    networks = []
    for index, shape in enumerate(shapes):
        everywhere = {key: value for key, value in overrides.items() if key not in own}
        given = {**preset.every, **(preset.finer if index else {}), **everywhere, **own.get(shape.name, {})}
        network = KINDS[preset.kind](**_known(given, preset.kind))
        asked = {**overrides, **own.get(shape.name, {})}
        if isinstance(network, PixelCNNConfig) and "num_heads" in asked and not network.attention_every:
            raise CodesError(
                f"prior option 'num_heads': level '{shape.name}' has no attention. Set attention_every too."
            )
        networks.append(network)
    return PriorConfig(shapes, tuple(networks), num_classes, tokenizer_fingerprint, name)


def _check_read(
    overrides: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]], shapes: tuple[LevelShape, ...], num_classes: int
) -> None:
    """Refuses values that no level would read."""
    given = {*overrides, *(key for values in own.values() for key in values)}
    if not num_classes and "label_dropout" in given:
        raise CodesError("prior option 'label_dropout': there are no labels to hide. Leave it out.")
    coarsest = {*own.get(shapes[0].name, {}), *(overrides if len(shapes) == 1 else ())}
    if "num_condition_blocks" in coarsest:
        raise CodesError(
            f"prior option 'num_condition_blocks': level '{shapes[0].name}' is the coarsest, and conditioned on no other. Leave it out."
        )


def _known(values: dict[str, Any], kind: str) -> dict[str, Any]:
    adjustable = [field.name for field in fields(KINDS[kind])]
    if "kind" in values:
        raise CodesError(
            f"prior option 'kind': it is the preset's, here {kind}. Choose another preset: {', '.join(PRESETS)}."
        )
    for key in values:
        if key not in adjustable:
            raise CodesError(
                f"prior option '{key}': expected one of {', '.join(adjustable)}.{did_you_mean(key, adjustable)}"
            )
    return values
