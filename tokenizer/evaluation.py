"""Measures what a tokenizer keeps of images, and how it uses its codes, over a whole set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenizer.metrics import SSIM_WINDOW, entropy_bits, nmse, perplexity, psnr, ssim, used_codes
from vqmill.errors import CodesError


class Coder(Protocol):
    """What is measured: anything that turns images into codes and back, such as a `Tokenizer`."""

    @property
    def config(self) -> Any:
        """Holds `codebook_size` K."""
        ...

    def prepare(self, images: Tensor) -> Tensor:
        """Images as they come -> float32 of the same shape in [-1, 1]."""
        ...

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Images -> codes in [0, K), [N, h, w] or [N, Q, h, w], for each level."""
        ...

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Codes -> images in [-1, 1] (float32)."""
        ...


@dataclass(frozen=True)
class Measured:
    """What one batch gave.

    Attributes:
        images: float32 [N, ..., H, W] in [-1, 1], the originals as the tokenizer sees them.
        reconstructions: the same from their codes alone.
        psnr: float64 [N], dB, of each image.
        ssim: float64 [N], of each image; None for images smaller than SSIM's window, 11 pixels.
        l1: float64 [N], mean absolute error of each image, for pixels in [-1, 1].
    """

    images: Tensor
    reconstructions: Tensor
    psnr: Tensor
    ssim: Tensor | None
    l1: Tensor


class Evaluation:
    """Adds up, batch by batch, what becomes of images that go through their codes: `decode(encode(images))`.

    Sums are float64 and lie on the model's device, so that neither the cut into batches nor their number matters.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Coder) -> None:
        self._model = model
        self._num_images = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._has_ssim = True

    @torch.no_grad()
    def add(self, images: Tensor, codes: Mapping[str, Tensor] | None = None) -> Measured:
        """Measures a batch.

        Args:
            images: as the model's `encode` takes them: uint8 in [0, 255] or float in [-1, 1].
            codes: what `encode` makes of them, where the caller has them already.

        Raises:
            CodesError: the images do not fit the model.
        """
        codes = self._model.encode(images) if codes is None else codes
        reconstructions = self._model.decode(codes, torch.float32)
        images = self._model.prepare(images.to(reconstructions.device))
        error = (reconstructions - images).double().flatten(1)
        squared, l1 = error.square().mean(dim=1), error.abs().mean(dim=1)
        measured = Measured(images, reconstructions, psnr(squared), _ssim(reconstructions, images), l1)
        pixels = images.double().flatten(1)
        sums = {
            "pixels": pixels.sum(),
            "squares": pixels.square().sum(),
            "count": torch.full((), pixels.numel(), dtype=torch.float64, device=pixels.device),
            "squared_error": error.square().sum(),
            "absolute_error": error.abs().sum(),
            "psnr": measured.psnr.sum(),
        }
        if measured.ssim is None:
            self._has_ssim = False
        else:
            sums["ssim"] = measured.ssim.sum()
        self._num_images += len(images)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value
        for name, value in _usage(codes, self._model.config.codebook_size).items():
            self._counts[name] = self._counts.get(name, 0) + value
        return measured

    def report(self) -> dict[str, float]:
        """The figures of all that was added.

        Returns:
            `nmse` (over the variance of this set); `psnr` in dB, of the mean squared error over the whole set, and `psnr_per_image`, the
            mean of each image's own, which is never lower; `ssim`, the mean over images, left out when images are smaller than its
            window; `l1`, mean absolute error of pixels in [-1, 1]; and for each level `{level}/used_codes`, `{level}/perplexity`,
            `{level}/entropy_bits` and `{level}/codebook_size`, with residual quantization for each of its stages `{level}/0`,
            `{level}/1`, .... Reconstructions are measured as `decode` gives them in float32: clamped to [-1, 1], not rounded to bytes.

        Raises:
            CodesError: nothing was added.
        """
        if self._num_images == 0:
            raise CodesError(
                "nothing to evaluate on: expected at least one batch of images. Hold out more of the corpus."
            )
        sums, number = self._sums, self._num_images
        mse = sums["squared_error"] / sums["count"]
        variance = sums["squares"] / sums["count"] - (sums["pixels"] / sums["count"]).square()
        report = {
            "nmse": nmse(mse, variance),
            "psnr": psnr(mse),
            "psnr_per_image": sums["psnr"] / number,
            "l1": sums["absolute_error"] / sums["count"],
        }
        if self._has_ssim:
            report["ssim"] = sums["ssim"] / number
        for name, counts in self._counts.items():
            report[f"{name}/used_codes"] = used_codes(counts)
            report[f"{name}/perplexity"] = perplexity(counts)
            report[f"{name}/entropy_bits"] = entropy_bits(counts)
            report[f"{name}/codebook_size"] = torch.tensor(len(counts))
        return {name: float(value) for name, value in report.items()}


def evaluate(model: Coder, batches: Iterable[Tensor]) -> dict[str, float]:
    """Measures a model, in evaluation mode, on batches of images; see `Evaluation.report`.

    Raises:
        CodesError: there is no batch, or images do not fit the model.
    """
    evaluation = Evaluation(model)
    for images in batches:
        evaluation.add(images)
    return evaluation.report()


def _ssim(reconstructions: Tensor, images: Tensor) -> Tensor | None:
    if min(images.shape[-2:]) < SSIM_WINDOW:
        return None
    return ssim((reconstructions + 1) / 2, (images + 1) / 2)


def _usage(codes: Mapping[str, Tensor], codebook_size: int) -> dict[str, Tensor]:
    """How often each code occurs, int64 [K], by level; [N, Q, h, w] gives each of the Q stages by itself."""
    stages = {}
    for name, values in codes.items():
        if values.ndim == 4:
            stages |= {f"{name}/{stage}": part for stage, part in enumerate(values.unbind(1))}
        else:
            stages[name] = values
    return {name: torch.bincount(part.flatten(), minlength=codebook_size) for name, part in stages.items()}
