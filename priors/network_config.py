"""The sizes of the networks that model one level's codes, one kind of settings for each kind of network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

_BOUNDS = {
    "depth": (1, 1 << 14),
    "num_layers": (0, 256),
    "horizontal": (1, 64),
    "vertical": (1, 64),
    "attention_every": (0, 256),
    "num_heads": (1, 1 << 10),
    "num_output_blocks": (0, 64),
    "num_condition_blocks": (0, 64),
}


@dataclass(frozen=True)
class _NetworkConfig:
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _BOUNDS:
                check_count(field.name, value, *_BOUNDS[field.name])
            elif isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise CodesError(f"{field.name}: expected true or false, found {value!r}.")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise CodesError(f"{field.name}: expected a probability in [0, 1), found {value!r}.")

    def _check_heads(self, depth: int, num_heads: int) -> None:
        if depth % num_heads:
            raise CodesError(f"num_heads: expected a divisor of depth {depth}, found {num_heads}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `network_config` makes an equal configuration."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class PixelCNNConfig(_NetworkConfig):
    """A gated PixelCNN (priors/gated.py).

    Attributes:
        depth: channels of every layer.
        num_layers: PixelConvB layers after the one PixelConvA (ours: with it, 8 of reach 1 see a grid of 8 x 8 whole).
        horizontal: how far one layer sees to the left (and, in rows above, to the right), in codes.
        vertical: how far one layer sees upward, in codes.
        norm: LayerNorm over channels before each layer and before the output stack.
        vertical_residual: residual connections in the vertical stack too; the horizontal stack always has them.
        position: learned vectors for each place of the grid.
        attention_every: an attention layer after every so many PixelConvB layers; 0 for none.
        num_heads: heads of each attention layer.
        num_output_blocks: residual 1x1 blocks between the two stacks and the logits.
        num_condition_blocks: residual 3x3 blocks that each coarser level goes through.
        dropout: probability at which activations are dropped in training, in [0, 1) (ours).
        label_dropout: probability at which a label is hidden in training, in [0, 1), so that label -1 ("any") is learned.
    """

    kind = "pixelcnn"

    depth: int = 64
    num_layers: int = 8
    horizontal: int = 1
    vertical: int = 1
    norm: bool = True
    vertical_residual: bool = True
    position: bool = True
    attention_every: int = 0
    num_heads: int = 8
    num_output_blocks: int = 1
    num_condition_blocks: int = 2
    dropout: float = 0.1
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_every:
            self._check_heads(self.depth, self.num_heads)


@dataclass(frozen=True)
class GPTConfig(_NetworkConfig):
    """A decoder-only transformer over the codes in raster order (priors/gpt.py).

    Attributes:
        depth: channels.
        num_layers: blocks of attention and a two-layer perceptron four times as wide.
        num_heads: heads of each attention; divides depth.
        num_condition_blocks: residual 3x3 blocks that each coarser level goes through.
        dropout: probability at which activations are dropped in training, in [0, 1).
        label_dropout: probability at which a label is hidden in training, in [0, 1), so that label -1 ("any") is learned.
    """

    kind = "gpt"

    depth: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_condition_blocks: int = 2
    dropout: float = 0.1
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads(self.depth, self.num_heads)


NetworkConfig = PixelCNNConfig | GPTConfig
KINDS: dict[str, type[PixelCNNConfig] | type[GPTConfig]] = {kind.kind: kind for kind in (PixelCNNConfig, GPTConfig)}


def network_config(values: Mapping[str, Any]) -> NetworkConfig:
    """The configuration that `to_dict` described.

    Raises:
        CodesError: an unknown kind or key, a missing key, or a value out of its range or of another sort.
    """
    if not isinstance(values, Mapping):
        raise CodesError(f"networks: expected an object, found {values!r}.")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CodesError(f"networks: expected a kind out of {', '.join(KINDS)}, found {kind!r}.")
    rest = {key: value for key, value in values.items() if key != "kind"}
    check_keys(f"a network of kind {kind}", rest, KINDS[kind])
    return KINDS[kind](**rest)


def check_keys(what: str, values: Mapping[str, Any], kind: type[Any]) -> None:
    """Raises CodesError unless `values` is an object whose keys are exactly the fields of the dataclass `kind`."""
    if not isinstance(values, Mapping):
        raise CodesError(f"{what}: expected an object, found {values!r}.")
    expected = [field.name for field in fields(kind)]
    for key in values:
        if key not in expected:
            raise CodesError(
                f"{what}: unknown key '{key}', expected {', '.join(expected)}.{did_you_mean(key, expected)}"
            )
    missing = [key for key in expected if key not in values]
    if missing:
        raise CodesError(f"{what}: missing {', '.join(missing)}.")


def check_count(what: str, value: object, low: int, high: int) -> None:
    """Raises CodesError unless the value is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CodesError(f"{what}: expected a whole number in {low}..{high}, found {value!r}.")
