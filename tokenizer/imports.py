"""Weights that other projects trained, as tokenizers of ours: the names of their tensors, and the sizes that these tell.

Three published layouts are known. Their weights are kept as they are: what differs outside the networks, such as the range of pixels, is
said by the configuration. (A scale could be folded into the outer convolutions; a shift could not, since their padding is zero.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from tokenizer.config import TokenizerConfig
from tokenizer.models import Tokenizer
from vqmill.checkpoint import build_module
from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

State = Mapping[str, Tensor]
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which a checkpoint may hold its weights
LISTED = 4  # names in a message
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, Lightning and torch.compile


@dataclass(frozen=True)
class Layout:
    """How a project names its tensors.

    Attributes:
        size: of its training images in pixels, which no tensor tells.
        pixel_range: what black and white are to its networks.
        mark: a tensor that no other layout has.
        sizes: its tensors -> fields of `TokenizerConfig`.
        modules: the configuration -> by name of a module of ours that of theirs.
        codebooks: the configuration -> by name of a tensor of our quantizers that of theirs.
        transposed: whether codebooks lie as [D, K].
    """

    size: int
    pixel_range: tuple[float, float]
    mark: str
    sizes: Callable[[State], dict[str, Any]]
    modules: Callable[[TokenizerConfig], dict[str, str]]
    codebooks: Callable[[TokenizerConfig], dict[str, str]]
    transposed: bool = False


def unwrap(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside of what a training script saved.

    Args:
        loaded: a state dict, or a mapping that holds one as `state_dict`, `model_state_dict` or `model`. Prefixes that DataParallel,
            Lightning or torch.compile put before every name are taken off.

    Returns:
        The tensors by name, and for people a line about each thing that was done or left aside.

    Raises:
        CodesError: it holds no state dict, or not only tensors.
    """
    notes = []
    for _ in WRAPPERS:  # one may lie inside another; a file can also make a circle of them
        key = next(
            (key for key in WRAPPERS if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)), ""
        )
        if not key:
            break
        others = ", ".join(sorted(str(other) for other in loaded if other != key))
        notes.append(f"the weights lay under {key!r}" + (f"; left aside: {others}" if others else ""))
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CodesError(
            f"expected a state dict (tensors by name), found {type(loaded).__name__}. Save model.state_dict()."
        )
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CodesError(
                f"{name!r}: expected a tensor, found {type(tensor).__name__}. A state dict (tensors by name) is expected, alone or under "
                f"{', '.join(WRAPPERS)}; here are {_some(map(str, loaded))}. Save model.state_dict()."
            )
    state = dict(loaded)
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), ""):
        notes.append(f"the prefix {prefix!r} was taken off every name")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, notes


def convert(
    state: State, layout: str, *, size: int | None = None, pixel_range: tuple[float, float] | None = None
) -> Tokenizer:
    """A tokenizer with the weights of a published layout; its codes are those of the source.

    Args:
        state: tensors by name, see `unwrap`.
        layout: one of `LAYOUTS`.
        size: side of the training images in pixels; the layout's own when None.
        pixel_range: what black and white were to the networks; the layout's own when None.

    Returns:
        The tokenizer on the CPU, in evaluation mode.

    Raises:
        CodesError: an unknown layout, a tensor is missing, is one too many, has another shape, or holds NaN or infinity.
    """
    if layout not in LAYOUTS:
        raise CodesError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}.{did_you_mean(layout, LAYOUTS)}")
    source = LAYOUTS[layout]
    if source.mark not in state:
        near = did_you_mean(source.mark, state)
        raise CodesError(
            f"tensor {source.mark!r} is missing, which every checkpoint of layout {layout!r} has.{near} {_unmarked(state)}"
        )
    config = TokenizerConfig(
        preset=f"imported-{layout}",
        size=source.size if size is None else size,
        pixel_range=source.pixel_range if pixel_range is None else pixel_range,
        **source.sizes(state),
    )
    with torch.device("meta"):  # shapes only
        expected = Tokenizer(config).state_dict()
    modules, codebooks = source.modules(config), source.codebooks(config)
    names = dict(codebooks)
    for name in expected.keys() - names.keys():
        module, _, kind = name.rpartition(".")
        if module in modules:
            names[name] = f"{modules[module]}.{kind}"
    _check_names(state, [names[name] for name in expected if name in names], layout)
    tensors = {}
    for name, wanted in expected.items():
        turned = bool(source.transposed and name in codebooks and wanted.ndim == 2)
        tensors[name] = (
            _tensor(state, names[name], wanted, turned=turned)
            if name in names
            else torch.zeros_like(wanted, device="cpu")
        )
    if layout == "unixpickle":  # it counts down from revive_after to 0 what we count up
        for name, tensor in tensors.items():
            if name.endswith(".idle_updates"):
                tensor.copy_((config.revive_after - tensor).clamp(0))
    return build_module(lambda: Tokenizer(config), tensors).eval()


def _unmarked(state: State) -> str:
    """What to do about tensors that are not of the layout that was named."""
    for name, other in LAYOUTS.items():
        if other.mark in state:
            return f"It looks like {name!r}."
        for found in state:
            if found.endswith(f".{other.mark}"):
                prefix = found.removesuffix(other.mark)
                return (
                    f"Below the prefix {prefix!r} it looks like {name!r}: save those tensors alone, without the prefix, as in "
                    f"{{n.removeprefix({prefix!r}): t for n, t in state.items() if n.startswith({prefix!r})}}."
                )
    marks = ", ".join(f"{name} ({other.mark!r})" for name, other in LAYOUTS.items())
    return f"These layouts can be imported: {marks}. It is none of them; its tensors are {_some(state)}."


def _check_names(state: State, wanted: list[str], layout: str) -> None:
    """Sees that there are the tensors of a layout and no others.

    Raises:
        CodesError: some are missing or too many, or have other names; the nearest is suggested.
    """
    missing, extra = [name for name in wanted if name not in state], sorted(state.keys() - set(wanted))
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing: {_some(missing)}.{did_you_mean(missing[0], extra)}")
    if extra:
        shape = list(state[extra[0]].shape)
        parts.append(f"{len(extra)} do not belong to it: {_some(extra)} (the first of shape {shape}).")
    if parts:
        advice = "Rename what has another name, and leave out what is no part of the tokenizer." if extra else (
            "Save the whole model's state_dict()."
        )  # fmt: skip
        raise CodesError(
            f"expected {len(wanted)} tensors of layout {layout!r} at these sizes, found {len(state)}: {' '.join(parts)} {advice}"
        )


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    given = list(names)
    more = f" and {len(given) - LISTED} more" if len(given) > LISTED else ""
    return ", ".join(map(repr, given[:LISTED])) + more


def _tensor(state: State, name: str, wanted: Tensor, *, turned: bool) -> Tensor:
    """A source's tensor in our dtype, once it is known to be what we expect."""
    shape = list(wanted.T.shape if turned else wanted.shape)
    found = _found(state, name)
    if list(found.shape) != shape or found.is_floating_point() != wanted.is_floating_point():
        raise CodesError(
            f"tensor {name!r}: expected {'floats' if wanted.is_floating_point() else 'whole numbers'} of shape {shape}, found {found.dtype} "
            f"{list(found.shape)}."
        )
    if found.numel() * found.element_size() > found.untyped_storage().nbytes():  # a few bytes that pretend to be many
        raise CodesError(
            f"tensor {name!r}: shape {shape}, but the file holds {found.untyped_storage().nbytes()} bytes of it."
        )
    if not torch.isfinite(found).all():
        raise CodesError(
            f"tensor {name!r} holds NaN or infinity: the training had diverged. Take an earlier checkpoint."
        )
    return (found.T if turned else found).detach().to(wanted.dtype, copy=True).contiguous()


def _found(state: State, name: str) -> Tensor:
    if name not in state:
        raise CodesError(
            f"tensor {name!r} is missing, which its sizes are read off.{did_you_mean(name, state)} There are {_some(state)}."
        )
    tensor = state[name]
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_complex() or tensor.is_quantized:
        raise CodesError(
            f"tensor {name!r}: expected a plain tensor, found {tensor.dtype} {tensor.layout} on {tensor.device}."
        )
    return tensor


def _shape(state: State, name: str, rank: int = 4) -> tuple[int, ...]:
    """The shape of a tensor from which sizes are read."""
    shape = tuple(_found(state, name).shape)
    if len(shape) != rank:
        raise CodesError(f"tensor {name!r}: expected {rank} dimensions, found shape {list(shape)}.")
    return shape


def _blocks(state: State, place: Callable[[int], str]) -> dict[str, Any]:
    """How many residual blocks there are, and what they are like; `place(i)` is the Sequential of block i."""
    number = next(i for i in count() if f"{place(i)}.1.weight" not in state)
    width = _shape(state, f"{place(0)}.1.weight")[0] if number else 1
    return {
        "num_residual_blocks": number,
        "residual_dim": width,
        "residual_bias": not number or f"{place(0)}.1.bias" in state,
    }


def _block_modules(ours: str, theirs: Callable[[int], str], number: int) -> dict[str, str]:
    """All three layouts have a block's convolutions at places 1 and 3 of a Sequential."""
    return {
        f"{ours}.{i}.{name}": f"{theirs(i)}.{place}"
        for i in range(number)
        for name, place in (("conv3", 1), ("conv1", 3))
    }


def _zalando_sizes(state: State) -> dict[str, Any]:
    hidden_dim = _shape(state, "_encoder._conv_2.weight")[0]
    codebook_size, code_dim = _shape(state, "_vq_vae._embedding.weight", 2)
    follows = any(name.startswith("_vq_vae._ema") for name in state)
    return {
        "channels": _shape(state, "_encoder._conv_1.weight")[1], "hidden_dim": hidden_dim, "codebook_size": codebook_size,
        "code_dim": code_dim, "quantizer": "ema" if follows else "gradient", "codebook_start": "normal" if follows else "uniform",
        "revival": "none", "rectified_skip": True, **_blocks(state, _zalando_block("_encoder")),
    }  # fmt: skip


def _zalando_block(coder: str) -> Callable[[int], str]:
    return lambda i: f"{coder}._residual_stack._layers.{i}._block"


def _zalando_modules(config: TokenizerConfig) -> dict[str, str]:
    number = config.num_residual_blocks
    return {
        **{f"net.encoders.0.{2 * i}": f"_encoder._conv_{i + 1}" for i in range(3)},
        **_block_modules("net.encoders.0.5", _zalando_block("_encoder"), number),
        "net.to_code.0": "_pre_vq_conv",
        "net.decoder.0": "_decoder._conv_1",
        **_block_modules("net.decoder.1", _zalando_block("_decoder"), number),
        "net.decoder.2": "_decoder._conv_trans_1",
        "net.decoder.4": "_decoder._conv_trans_2",
    }


def _zalando_codebooks(config: TokenizerConfig) -> dict[str, str]:
    names = {"codebook": "_embedding.weight"}
    if config.quantizer == "ema":
        names |= {"ema_counts": "_ema_cluster_size", "ema_sums": "_ema_w"}
    return {f"net.levels.codes.{ours}": f"_vq_vae.{theirs}" for ours, theirs in names.items()}


def _rosinality_sizes(state: State) -> dict[str, Any]:
    code_dim, codebook_size = _shape(state, "quantize_t.embed", 2)
    return {
        "channels": _shape(state, "enc_b.blocks.0.weight")[1], "hidden_dim": _shape(state, "enc_b.blocks.2.weight")[0],
        "codebook_size": codebook_size, "code_dim": code_dim, "num_levels": 2, "codebook_start": "normal", "revival": "none",
        **_blocks(state, lambda i: f"enc_b.blocks.{5 + i}.conv"),
    }  # fmt: skip


def _rosinality_modules(config: TokenizerConfig) -> dict[str, str]:
    number = config.num_residual_blocks

    def blocks(ours: str, coder: str, first: int) -> dict[str, str]:
        return _block_modules(ours, lambda i: f"{coder}.blocks.{first + i}.conv", number)

    return {
        **{f"net.encoders.0.{i}": f"enc_b.blocks.{i}" for i in (0, 2, 4)},
        **blocks("net.encoders.0.5", "enc_b", 5),
        **{f"net.encoders.1.{i}": f"enc_t.blocks.{i}" for i in (0, 2)},
        **blocks("net.encoders.1.3", "enc_t", 3),
        "net.to_code.0": "quantize_conv_t",
        "net.to_code.1": "quantize_conv_b",
        "net.conditions.0.0": "dec_t.blocks.0",
        **blocks("net.conditions.0.1", "dec_t", 1),
        "net.conditions.0.2": f"dec_t.blocks.{number + 2}",
        "net.upsamplers.0": "upsample_t",
        "net.decoder.0": "dec.blocks.0",
        **blocks("net.decoder.1", "dec", 1),
        "net.decoder.2": f"dec.blocks.{number + 2}",
        "net.decoder.4": f"dec.blocks.{number + 4}",
    }


def _rosinality_codebooks(config: TokenizerConfig) -> dict[str, str]:
    names = {"codebook": "embed", "ema_counts": "cluster_size", "ema_sums": "embed_avg"}
    return {
        f"net.levels.{level}.{ours}": f"quantize_{level[0]}.{theirs}"
        for level in config.level_names
        for ours, theirs in names.items()
    }


def _unixpickle_sizes(state: State) -> dict[str, Any]:
    codebook_size, width = _shape(state, "encoder_0.vq.dictionary", 2)
    number = next(i for i in count() if f"encoder_{i}.vq.dictionary" not in state)
    if number > 2:
        raise CodesError(f"{number} encoders: expected 1 or 2, the source has no decoder for more.")
    usage = _found(state, "encoder_0.vq.usage_count")
    if usage.is_floating_point() or not usage.numel():
        raise CodesError(
            f"tensor 'encoder_0.vq.usage_count': expected whole numbers, found {usage.dtype} {list(usage.shape)}."
        )
    return {
        "architecture": "unixpickle", "channels": _shape(state, "encoder_0.conv1.weight")[1], "num_levels": number, "hidden_dim": width,
        "residual_dim": width, "code_dim": width, "codebook_size": codebook_size, "quantizer": "gradient", "codebook_start": "normal",
        "revival": "unused", "revive_after": max(1, int(usage.max())),  # what was just used has the full count
    }  # fmt: skip


def _unixpickle_modules(config: TokenizerConfig) -> dict[str, str]:
    def blocks(ours: str, theirs: str, first: int = 1) -> dict[str, str]:
        return _block_modules(ours, lambda i: f"{theirs}.residual{first + i}", config.num_residual_blocks)

    bottom = {"net.encoders.0.conv1": "encoder_0.conv1", "net.encoders.0.conv2": "encoder_0.conv2"}
    bottom |= blocks("net.encoders.0.residuals", "encoder_0")
    if config.num_levels == 1:
        pixels = {f"net.decoders.0.last.conv{i}": f"decoder_0.conv{i}" for i in (1, 2)}
        return {**bottom, **blocks("net.decoders.0.last.residuals", "decoder_0"), **pixels}
    mixer = "net.decoders.1.mixers.0"
    return {
        **bottom,
        "net.encoders.1.conv": "encoder_1.conv",
        **blocks("net.encoders.1.residuals", "encoder_1"),
        "net.decoders.0.last.conv": "decoder_0.conv",
        **blocks("net.decoders.0.last.residuals", "decoder_0"),
        f"{mixer}.up.conv": "decoder_1.conv1",
        **blocks(f"{mixer}.up.residuals", "decoder_1"),
        f"{mixer}.mix": "decoder_1.conv2",
        "net.decoders.1.last.conv1": "decoder_1.conv3",
        "net.decoders.1.last.conv2": "decoder_1.conv4",
        **blocks("net.decoders.1.last.residuals", "decoder_1", first=3),
    }


def _unixpickle_codebooks(config: TokenizerConfig) -> dict[str, str]:
    names = {"codebook": "dictionary", "idle_updates": "usage_count"}
    return {
        f"net.levels.{level}.{ours}": f"encoder_{place}.vq.{theirs}"
        for place, level in enumerate(reversed(config.level_names))
        for ours, theirs in names.items()
    }


LAYOUTS = {
    # github.com/zalandoresearch/pytorch-vq-vae: one notebook; in an earlier version images lay in [-1, 1].
    "zalando": Layout(
        32, (-0.5, 0.5), "_vq_vae._embedding.weight", _zalando_sizes, _zalando_modules, _zalando_codebooks
    ),
    # github.com/unixpickle/vq-vae-2: vq_vae_2/vq_vae.py and examples/hierarchical.
    "unixpickle": Layout(
        256, (0.0, 1.0), "encoder_0.vq.dictionary", _unixpickle_sizes, _unixpickle_modules, _unixpickle_codebooks
    ),
    # github.com/rosinality/vq-vae-2-pytorch: vqvae.py and train_vqvae.py.
    "rosinality": Layout(
        256, (-1.0, 1.0), "quantize_t.embed", _rosinality_sizes, _rosinality_modules, _rosinality_codebooks, transposed=True
    ),
}  # fmt: skip
