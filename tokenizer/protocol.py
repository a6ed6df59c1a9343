"""What the commands ask of a tokenizer, ours or anybody's. docs/tokenizer-protocol.md explains it to people who write one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from vqmill.errors import CodesError
from vqmill.settings import did_you_mean
from vqmill.spec import LevelSpec


class ImageTokenizer(Protocol):
    """Images to grids of codes and back. `tokenizer.Tokenizer` is one."""

    @property
    def name(self) -> str:
        """For people; recorded in the stores that it makes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever codes would: a hash of weights and configuration. At most 128 printable characters."""
        ...

    @property
    def channels(self) -> int:
        """C of the images, 1 (grey) or 3 (RGB)."""
        ...

    @property
    def size(self) -> int:
        """Height and width that images are brought to when nobody asks for another size, pixels."""
        ...

    @property
    def levels(self) -> Mapping[str, int]:
        """Each level's codebook size K, coarse to fine; one level is called `codes`, two are `top` and `bottom`."""
        ...

    def grid(self, level: str, size: int) -> tuple[int, ...]:
        """The shape of a level's codes for one image of size x size pixels: (h, w), or (Q, h, w) of Q residual codes.

        Raises:
            ValueError: no such level, or a size that does not fit.
        """
        ...

    def encode(self, images: Tensor) -> Mapping[str, Tensor]:
        """uint8 [N, C, H, W] in [0, 255] -> for each level int64 [N, *grid] in [0, K), the same whatever N is."""
        ...

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """Codes as `encode` gives them -> uint8 [N, C, H, W]."""
        ...

    def to(self, device: Any) -> Any:
        """Moves it to a torch device, in place; images and codes will be given on that device."""
        ...


MEMBERS = tuple(name for name in vars(ImageTokenizer) if not name.startswith("_"))


def check_facts(model: Any) -> None:
    """Sees that an object says what an `ImageTokenizer` must say; nothing is encoded.

    Raises:
        CodesError: a member is missing, or is not what it must be.
    """
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    if missing:
        raise CodesError(f"a {type(model).__name__} has no {', '.join(missing)}; a tokenizer has {', '.join(MEMBERS)}.")
    for name in ("name", "fingerprint"):
        text = getattr(model, name)
        if not isinstance(text, str) or not 0 < len(text) <= 128 or not text.isprintable():
            raise CodesError(f"{name}: expected 1 to 128 printable characters, found {text!r}.")
    if model.channels not in (1, 3) or isinstance(model.channels, bool):
        raise CodesError(f"channels: expected 1 (grey) or 3 (RGB), found {model.channels!r}.")
    if type(model.size) is not int or model.size < 1:
        raise CodesError(f"size: expected a number of pixels, found {model.size!r}.")
    levels = model.levels
    if not isinstance(levels, Mapping) or not levels or not all(type(size) is int for size in levels.values()):
        raise CodesError(f"levels: expected each level's codebook size by its name, found {levels!r}.")
    level_specs(model, model.size)


def level_specs(model: ImageTokenizer, size: int) -> tuple[LevelSpec, ...]:
    """What a store holds of each level, for images of size x size pixels.

    Raises:
        CodesError: the size does not fit, or the grid is none.
    """
    specs = []
    for name, codebook_size in model.levels.items():
        try:
            grid = tuple(model.grid(name, size))
        except CodesError:
            raise
        except Exception as error:  # whoever wrote it decides what is raised
            raise CodesError(
                f"{model.name}: size {size} does not fit: grid({name!r}, {size}) says {error!r}."
            ) from error
        if len(grid) not in (2, 3) or not all(type(side) is int and side > 0 for side in grid):
            raise CodesError(f"{model.name}: grid({name!r}, {size}): expected (h, w) or (Q, h, w), found {grid!r}.")
        specs.append(LevelSpec(name, codebook_size, grid, outer="depth" if len(grid) == 3 else "time"))
    return tuple(specs)


def check_codes(model: ImageTokenizer, codes: Any, number: int, size: int) -> None:
    """Sees that codes are those of so many images of size x size pixels.

    Raises:
        CodesError: a level is missing or unknown, or its codes have another dtype or shape, or lie outside of the codebook.
    """
    if not isinstance(codes, Mapping) or codes.keys() != model.levels.keys():
        found = ", ".join(map(str, codes)) if isinstance(codes, Mapping) else type(codes).__name__
        hints = (
            [did_you_mean(str(name), model.levels) for name in codes if name not in model.levels]
            if isinstance(codes, Mapping)
            else []
        )
        raise CodesError(
            f"{model.name}: encode: expected levels {', '.join(model.levels)}, found {found}.{''.join(hints[:1])}"
        )
    for level in level_specs(model, size):
        values, expected = codes[level.name], [number, *level.grid]
        if not isinstance(values, Tensor) or values.dtype != torch.int64 or list(values.shape) != expected:
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise CodesError(f"{model.name}: encode: level {level.name!r}: expected int64 {expected}, found {found}.")
        wrong = values[(values < 0) | (values >= level.codebook_size)]
        if len(wrong):
            raise CodesError(
                f"{model.name}: encode: level {level.name!r} gave code {int(wrong[0])}, but its codebook_size is {level.codebook_size} "
                f"(valid 0..{level.codebook_size - 1}). Mend the tokenizer's levels or its encode."
            )


def check_images(model: ImageTokenizer, images: Any, codes: Mapping[str, Tensor]) -> None:
    """Sees that `decode` gave bytes, of a size that has just these codes.

    Raises:
        CodesError: another type, dtype or shape.
    """
    number = len(next(iter(codes.values())))
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = f"{images.dtype}{_bounds(images)}" if isinstance(images, Tensor) else type(images).__name__
        raise CodesError(
            f"{model.name}: decode: expected torch.uint8 in [0, 255], found {found}. Scale the pixels to [0, 255], clamp and round them, "
            "and make them bytes: .to(torch.uint8)."
        )
    side = images.shape[-1] if images.ndim else 0
    given = ", ".join(_grid_text(level, values.shape[1:]) for level, values in codes.items())
    if list(images.shape) != [number, model.channels, side, side] or _grids(model, codes, side) != given:
        raise CodesError(
            f"{model.name}: decode: expected torch.uint8 [{number}, {model.channels}, S, S] of a size S that has these codes, {given}; found "
            f"{list(images.shape)}. By its grid, size {model.size} has {_grids(model, codes, model.size)}, and size {side} has "
            f"{_grids(model, codes, side)}. Mend its decode, or its grid."
        )


def check_scale(model: ImageTokenizer, images: Tensor) -> None:
    """Sees that pixels of `decode` use their whole range. Where all of these images are black and white, a white one is sent through the codes.

    Raises:
        CodesError: they do not: floats in [0, 1] or [-1, 1] were made into bytes as they are.
    """
    if images.numel() and int((images + 1).max()) <= 2:  # bytes wrap: there are none but 255 (-1 as a byte), 0 and 1
        white = torch.full((1, model.channels, model.size, model.size), 255, dtype=torch.uint8, device=images.device)
        if int(model.decode(model.encode(white)).max()) <= 1:
            raise CodesError(
                f"{model.name}: decode: expected pixels in [0, 255], found at most 1, even for a white image. Scale floats to [0, 255] "
                "before they are made bytes."
            )


def _grids(model: ImageTokenizer, levels: Iterable[str], size: int) -> str:
    """What codes an image of size x size pixels has."""
    try:
        return ", ".join(_grid_text(level, model.grid(level, size)) for level in levels)
    except Exception as error:  # whoever wrote it decides what is raised
        return f"none ({error!r})"


def _grid_text(level: str, grid: Iterable[int]) -> str:
    return f"{level} {'x'.join(map(str, grid))}"


def _bounds(images: Tensor) -> str:
    if not images.numel() or images.is_complex():
        return ""
    low, high = (float(bound) for bound in images.aminmax())
    return f" from {low:g} to {high:g}"
