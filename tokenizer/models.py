"""The tokenizer: from images, or clips, to codes and back, whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.grouped import GroupedNet
from tokenizer.losses import pixels, to_bytes, to_floats
from tokenizer.net import Net
from tokenizer.quantized import Quantized, Quantizer
from tokenizer.strided import StridedNet
from tokenizer.unixpickle import UnixpickleNet
from vqmill.checkpoint import fingerprint
from vqmill.errors import CodesError
from vqmill.settings import did_you_mean

SLICE_IMAGES, SLICE_IMAGES_DEVICE = 8, 64  # that are encoded together, on a CPU and on an accelerator

MOST_PIXEL = 1.01  # interpolation leaves [-1, 1] by a little

ARCHITECTURES: dict[str, type[Net]] = {"strided": StridedNet, "unixpickle": UnixpickleNet, "grouped": GroupedNet}


@dataclass(frozen=True)
class Reconstruction:
    """What a tokenizer makes of images.

    Attributes:
        images: float32, of the shape of the images; about [-1, 1], not clamped.
        outputs: float [N, output_channels, H, W], what the reconstruction loss looks at; see `tokenizer.losses`.
        levels: each level's quantized features, coarse to fine.
        auxiliary: scalar, losses of the architecture's own; None when it has none.
    """

    images: Tensor
    outputs: Tensor
    levels: dict[str, Quantized]
    auxiliary: Tensor | None


class Tokenizer(nn.Module):
    """Images to grids of codes and back.

    Args:
        config: sizes and recipe; weights are drawn from torch's global generator.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.net = ARCHITECTURES[config.architecture](config)

    @property
    def fingerprint(self) -> str:
        """A name for exactly these weights with this configuration, 32 hex digits. Computed anew at each use."""
        return fingerprint(self.state_dict(), self.config.to_dict())

    @property
    def name(self) -> str:
        """The preset."""
        return self.config.preset

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.config.channels

    @property
    def size(self) -> int:
        """Height and width of the training images in pixels."""
        return self.config.size

    @property
    def levels(self) -> dict[str, int]:
        """Each level's codebook size, coarse to fine."""
        return dict.fromkeys(self.config.level_names, self.config.codebook_size)

    def grid(self, level: str, size: int | None = None) -> tuple[int, ...]:
        """The shape of a level's codes for one image; see `TokenizerConfig.grid`."""
        return self.config.grid(level, size)

    @property
    def num_parameters(self) -> int:
        """How many numbers the optimizer learns; codebooks that follow by averages are not among them."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Each level's quantizer, coarse to fine."""
        return self.net.quantizers

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstructs images as `prepare` gives them, differentiably; the path that training takes."""
        coded = self.net(self._inward(images))
        outputs = self._outward(coded.outputs)
        return Reconstruction(self._pixels(outputs), outputs, coded.levels, coded.auxiliary)

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Turns images into codes. An image's codes do not depend on the batch that it comes in.

        Convolutions round differently for other numbers of images, and then a feature between two entries may go to the other one. So
        the networks always see slices of one size, the last one filled up with zeros.

        Args:
            images: uint8 [N, C, H, W] in [0, 255], or float in [-1, 1]; H and W multiples of `config.downsample`. With `config.frames`
                T > 1 clips [N, T, C, H, W].

        Returns:
            For each level int64 [N, h, w] in [0, K) (with residual quantization [N, Q, h, w]), on the device of the model, whatever that
            of the images.

        Raises:
            CodesError: another shape or dtype, an image size that does not fit, or floats that are no pixels.
        """
        prepared = self.prepare(images.to(self._device))
        if images.is_floating_point() and images.numel():
            low, high = (float(bound) for bound in prepared.aminmax())
            if not (low >= -MOST_PIXEL and high <= MOST_PIXEL):
                raise CodesError(
                    f"images: expected floats in [-1, 1], found {low:g} to {high:g}. Scale them, or give uint8."
                )
        ready = self._inward(prepared)
        size = SLICE_IMAGES if ready.device.type == "cpu" else SLICE_IMAGES_DEVICE
        whole = F.pad(ready, (0, 0, 0, 0, 0, 0, 0, -len(ready) % size))
        parts = [self.net.encode(part) for part in whole.split(size)]
        return {name: torch.cat([part[name] for part in parts])[: len(ready)] for name in parts[0]}

    def compile_encoder(self) -> None:
        """From now on `encode` runs networks that torch.compile has made; quantizers stay as they are. Some codes may change.

        The first batch of a size takes seconds to minutes. On CPUs a C++ compiler must be there.
        """
        for quantizer in self.net.quantizers.values():
            quantizer.encode = torch.compiler.disable(quantizer.encode)  # pyright: ignore[reportAttributeAccessIssue] - of this one object
        self.net.encode = torch.compile(self.net.encode, dynamic=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Checks images (see `encode`) and gives them as float32 in [-1, 1], of the same shape."""
        config = self.config
        frames = () if config.frames == 1 else (config.frames,)
        expected = ", ".join(map(str, ("N", *frames, config.channels, "H", "W")))
        if images.ndim != 4 + len(frames) or images.shape[1:-2] != (*frames, config.channels):
            raise CodesError(f"images: expected shape [{expected}], found {list(images.shape)}.")
        height, width = images.shape[-2:]
        multiple = config.downsample
        if not height or not width or height % multiple or width % multiple:
            raise CodesError(
                f"images: expected height and width to be multiples of {multiple}, found {height}x{width}. Resize or crop them."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise CodesError(f"images: expected uint8 in [0, 255] or float in [-1, 1], found {images.dtype}.")
        return to_floats(images)

    def stack(self, images: Tensor) -> Tensor:
        """Clips [N, T, C, H, W] -> [N, T * C, H, W]; images stay as they are."""
        return images.flatten(1, 2) if images.ndim == 5 else images

    def _inward(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], or clips, as the networks see them: frames stacked, in `config.pixel_range`."""
        low, high = self.config.pixel_range
        images = self.stack(images)
        return images if (low, high) == (-1, 1) else (images + 1) * ((high - low) / 2) + low

    def _outward(self, outputs: Tensor) -> Tensor:
        """What the networks give, from `config.pixel_range` to [-1, 1]."""
        low, high = self.config.pixel_range
        return outputs if (low, high) == (-1, 1) else (outputs - low) * (2 / (high - low)) - 1

    def _pixels(self, outputs: Tensor) -> Tensor:
        images = pixels(self.config.loss, outputs)
        return images if self.config.frames == 1 else images.unflatten(1, (self.config.frames, self.config.channels))

    @torch.no_grad()
    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype = torch.uint8) -> Tensor:
        """Turns codes into images.

        Args:
            codes: for each level integers as `encode` gives them. Architecture `unixpickle` does without finer levels: it predicts them
                from those above.
            dtype: torch.uint8 or torch.float32.

        Returns:
            uint8 [N, C, H, W] in [0, 255], or float32 in [-1, 1]; clips [N, T, C, H, W].

        Raises:
            CodesError: a level is missing or unknown, grids do not fit together, or a code is out of range.
        """
        if dtype not in (torch.uint8, torch.float32):
            raise CodesError(f"dtype: expected torch.uint8 or torch.float32, found {dtype}.")
        images = self._pixels(self._outward(self.net.decode(self._checked(codes)))).clamp(-1, 1)
        return images if dtype == torch.float32 else to_bytes(images)

    def _checked(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes as int64 on the model's device, once they are known to be decodable."""
        config, names = self.config, self.config.level_names
        for name in codes:
            if name not in names:
                raise CodesError(f"level '{name}': expected {', '.join(names)}.{did_you_mean(name, names)}")
        given = [name for name in names if name in codes]
        needed = names if config.architecture != "unixpickle" else names[: max(1, len(given))]
        missing = [name for name in needed if name not in codes]
        if missing:
            raise CodesError(f"codes: level {', '.join(missing)} is missing; all of {', '.join(needed)} are needed.")
        depth = () if config.num_quantizers == 1 else (config.num_quantizers,)
        checked = {name: _in_range(name, codes[name], config.codebook_size, depth).to(self._device) for name in needed}
        coarsest = checked[names[0]].shape
        for level, name in enumerate(needed):
            expected = (*coarsest[:-2], coarsest[-2] << level, coarsest[-1] << level)
            if tuple(checked[name].shape) != expected:
                raise CodesError(
                    f"codes: '{name}' of shape {list(checked[name].shape)} does not fit '{names[0]}' of shape {list(coarsest)}; "
                    "each finer grid has twice the sides and the same N."
                )
        return checked

    def sort_by_usage(self) -> None:
        """Renumbers every level's codes, 0 the most used. Once, when training ends, before the fingerprint is taken."""
        for quantizer in self.quantizers.values():
            quantizer.sort_by_usage()


def _in_range(name: str, codes: Tensor, codebook_size: int, depth: tuple[int, ...]) -> Tensor:
    wrong_kind = codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool
    if wrong_kind or codes.ndim != 3 + len(depth) or codes.shape[1:-2] != depth:
        expected = ", ".join(map(str, ("N", *depth, "h", "w")))
        raise CodesError(
            f"level '{name}': expected integers of shape [{expected}], found {codes.dtype} {list(codes.shape)}."
        )
    codes = codes.long()  # also because torch cannot compare every unsigned type
    wrong = codes[(codes < 0) | (codes >= codebook_size)]
    if len(wrong):
        raise CodesError(
            f"level '{name}' holds code {int(wrong[0])}, but codebook_size is {codebook_size} (valid 0..{codebook_size - 1})."
        )
    return codes
