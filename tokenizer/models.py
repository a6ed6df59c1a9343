"""The VQ-VAE and the VQ-VAE-2: from images to codes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.decoders import HalfDecoder, QuarterDecoder
from tokenizer.encoders import HalfEncoder, QuarterEncoder
from tokenizer.quantizers import EMAQuantizer, Quantized
from vqmill.checkpoint import fingerprint
from vqmill.errors import CodesError
from vqmill.settings import did_you_mean


@dataclass(frozen=True)
class Reconstruction:
    """What a tokenizer makes of images.

    Attributes:
        images: float [N, C, H, W], the reconstruction; about [-1, 1], not clamped.
        levels: each level's quantized features, coarse to fine.
    """

    images: Tensor
    levels: dict[str, Quantized]


class VQVAE(nn.Module):
    """One grid of codes at a quarter of the image's side (van den Oord et al. 2017)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        sizes = (config.hidden_dim, config.residual_dim, config.num_residual_blocks)
        self.encoder = QuarterEncoder(config.channels, *sizes)
        self.to_code = nn.Conv2d(config.hidden_dim, config.code_dim, 1)
        self.quantizer = _quantizer(config)
        self.decoder = QuarterDecoder(config.code_dim, config.channels, *sizes)

    @property
    def quantizers(self) -> dict[str, EMAQuantizer]:
        """The quantizer of each level."""
        return {"codes": self.quantizer}

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstructs float images [N, C, H, W] in [-1, 1]."""
        quantized = self.quantizer(self.to_code(self.encoder(images)))
        return Reconstruction(self.decoder(quantized.vectors), {"codes": quantized})

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Images, float [N, C, H, W] in [-1, 1] -> codes, int64 [N, H/4, W/4]."""
        return {"codes": self.quantizer.encode(self.to_code(self.encoder(images)))}

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """Codes as `encode` gives them -> float [N, C, H, W]."""
        return self.decoder(self.quantizer.decode(codes["codes"]))


class VQVAE2(nn.Module):
    """Two grids of codes: `bottom` at a quarter of the image's side, `top` at an eighth (Razavi et al. 2019, figure 2a).

    The top is quantized first; its decoded features join the bottom encoder's before the bottom is quantized, so that the bottom
    need only hold what the top does not. The pixel decoder sees both.

    Where we differ: in training, during the first half of the warm-up (updates before `start_step` / 2), the pixel decoder sees zeros
    for the bottom. Otherwise the finer grid, still unquantized, learns to carry everything, and the top's codes end up almost ignored.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        sizes = (config.hidden_dim, config.residual_dim, config.num_residual_blocks)
        hidden_dim, code_dim = config.hidden_dim, config.code_dim
        self.encoder_bottom = QuarterEncoder(config.channels, *sizes)
        self.encoder_top = HalfEncoder(*sizes)
        self.to_top = nn.Conv2d(hidden_dim, code_dim, 1)
        self.decoder_top = HalfDecoder(code_dim, *sizes)
        self.to_bottom = nn.Conv2d(2 * hidden_dim, code_dim, 1)
        self.quantizer_top = _quantizer(config)
        self.quantizer_bottom = _quantizer(config)
        self.upsample_top = nn.ConvTranspose2d(code_dim, code_dim, 4, stride=2, padding=1)
        self.decoder = QuarterDecoder(2 * code_dim, config.channels, *sizes)

    @property
    def quantizers(self) -> dict[str, EMAQuantizer]:
        """The quantizer of each level."""
        return {"top": self.quantizer_top, "bottom": self.quantizer_bottom}

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstructs float images [N, C, H, W] in [-1, 1]."""
        features = self.encoder_bottom(images)
        top = self.quantizer_top(self.to_top(self.encoder_top(features)))
        bottom = self.quantizer_bottom(self._bottom_features(features, top.vectors))
        bottom_vectors = bottom.vectors
        if self.training:
            heard = self.quantizer_top.num_updates >= self.quantizer_top.start_step // 2
            bottom_vectors = torch.where(heard, bottom_vectors, torch.zeros_like(bottom_vectors))
        return Reconstruction(self._pixels(top.vectors, bottom_vectors), {"top": top, "bottom": bottom})

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Images, float [N, C, H, W] in [-1, 1] -> top codes, int64 [N, H/8, W/8], and bottom codes, int64 [N, H/4, W/4]."""
        features = self.encoder_bottom(images)
        top = self.quantizer_top.encode(self.to_top(self.encoder_top(features)))
        top_vectors = self.quantizer_top.decode(top)
        return {"top": top, "bottom": self.quantizer_bottom.encode(self._bottom_features(features, top_vectors))}

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """Codes as `encode` gives them -> float [N, C, H, W]."""
        return self._pixels(self.quantizer_top.decode(codes["top"]), self.quantizer_bottom.decode(codes["bottom"]))

    def _bottom_features(self, features: Tensor, top_vectors: Tensor) -> Tensor:
        return self.to_bottom(torch.cat([self.decoder_top(top_vectors), features], dim=1))

    def _pixels(self, top_vectors: Tensor, bottom_vectors: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.upsample_top(top_vectors), bottom_vectors], dim=1))


def _quantizer(config: TokenizerConfig) -> EMAQuantizer:
    return EMAQuantizer(
        config.codebook_size,
        config.code_dim,
        ema_decay=config.ema_decay,
        start_step=config.start_step,
        revive_fraction=config.revive_fraction,
        pool_size=config.pool_size,
    )


class Tokenizer(nn.Module):
    """Images to grids of codes and back.

    Args:
        config: sizes and recipe; weights are drawn from torch's global generator.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.net = VQVAE(config) if config.num_levels == 1 else VQVAE2(config)

    @property
    def fingerprint(self) -> str:
        """A name for exactly these weights with this configuration, 32 hex digits. Computed anew at each use."""
        return fingerprint(self.state_dict(), self.config.to_dict())

    @property
    def num_parameters(self) -> int:
        """How many numbers the optimizer learns; the codebooks, which follow by averages, are not among them."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def quantizers(self) -> dict[str, EMAQuantizer]:
        """Each level's quantizer, coarse to fine."""
        return self.net.quantizers

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstructs float images [N, C, H, W] in [-1, 1], differentiably; the path that training takes."""
        return self.net(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Turns images into codes.

        Args:
            images: uint8 [N, C, H, W] in [0, 255], or float in [-1, 1]; H and W multiples of `config.downsample`.

        Returns:
            For each level int64 [N, h, w] in [0, K), on the device of the model, whatever that of the images.

        Raises:
            CodesError: another shape or dtype, or an image size that does not fit.
        """
        return self.net.encode(self.prepare(images.to(self._device)))

    def prepare(self, images: Tensor) -> Tensor:
        """Checks images (see `encode`) and gives them as float32 [N, C, H, W] in [-1, 1]."""
        channels, multiple = self.config.channels, self.config.downsample
        if images.ndim != 4 or images.shape[1] != channels:
            raise CodesError(f"images: expected shape [N, {channels}, H, W], found {list(images.shape)}.")
        height, width = images.shape[2:]
        if not height or not width or height % multiple or width % multiple:
            raise CodesError(
                f"images: expected height and width to be multiples of {multiple}, found {height}x{width}. Resize or crop them."
            )
        if images.dtype == torch.uint8:
            return images.float() / 127.5 - 1
        if not images.is_floating_point():
            raise CodesError(f"images: expected uint8 in [0, 255] or float in [-1, 1], found {images.dtype}.")
        return images.float()

    @torch.no_grad()
    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype = torch.uint8) -> Tensor:
        """Turns codes into images.

        Args:
            codes: for each level integers [N, h, w] in [0, K), as `encode` gives them.
            dtype: torch.uint8 or torch.float32.

        Returns:
            uint8 [N, C, H, W] in [0, 255], or float32 in [-1, 1].

        Raises:
            CodesError: a level is missing or unknown, grids do not fit together, or a code is out of range.
        """
        if dtype not in (torch.uint8, torch.float32):
            raise CodesError(f"dtype: expected torch.uint8 or torch.float32, found {dtype}.")
        images = self.net.decode(self._checked(codes)).float().clamp(-1, 1)
        return images if dtype == torch.float32 else ((images + 1) * 127.5).round().to(torch.uint8)

    def _checked(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes as int64 on the model's device, once they are known to be decodable."""
        names = self.config.level_names
        for name in codes:
            if name not in names:
                raise CodesError(f"level '{name}': expected {', '.join(names)}.{did_you_mean(name, names)}")
        missing = [name for name in names if name not in codes]
        if missing:
            raise CodesError(f"codes: level {', '.join(missing)} is missing; all of {', '.join(names)} are needed.")
        checked = {name: _in_range(name, codes[name], self.config.codebook_size).to(self._device) for name in names}
        finest = checked[names[-1]].shape
        for name in names[:-1]:
            expected = (finest[0], finest[1] // 2, finest[2] // 2)
            if tuple(checked[name].shape) != expected or finest[1] % 2 or finest[2] % 2:
                raise CodesError(
                    f"codes: '{name}' of shape {list(checked[name].shape)} does not fit '{names[-1]}' of shape {list(finest)}; "
                    "the finer grid has twice the sides and the same N."
                )
        return checked

    def sort_by_usage(self) -> None:
        """Renumbers every level's codes, 0 the most used. Once, when training ends, before the fingerprint is taken."""
        for quantizer in self.quantizers.values():
            quantizer.sort_by_usage()


def _in_range(name: str, codes: Tensor, codebook_size: int) -> Tensor:
    if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise CodesError(
            f"level '{name}': expected integers of shape [N, h, w], found {codes.dtype} {list(codes.shape)}."
        )
    codes = codes.long()  # also because torch cannot compare every unsigned type
    wrong = codes[(codes < 0) | (codes >= codebook_size)]
    if len(wrong):
        raise CodesError(
            f"level '{name}' holds code {int(wrong[0])}, but codebook_size is {codebook_size} (valid 0..{codebook_size - 1})."
        )
    return codes
