"""Measures what a tokenizer keeps of images, and how it uses its codes, over a whole set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.losses import to_floats
from tokenizer.metrics import SSIM_WINDOW, entropy_bits, nmse, perplexity, psnr, ssim, used_codes
from tokenizer.models import Tokenizer
from tokenizer.protocol import ImageTokenizer
from vqmill.errors import CodesError


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
        model: any tokenizer, in evaluation mode. Ours gives its reconstructions as floats; others give bytes, and those are measured.
    """

    def __init__(self, model: ImageTokenizer) -> None:
        self._model = model
        self._num_images = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._has_ssim = True

    @torch.no_grad()
    def add(self, images: Tensor, codes: Mapping[str, Tensor] | None = None) -> Measured:
        """Measures a batch.

        Args:
            images: [N, ..., H, W], uint8 in [0, 255]; or float in [-1, 1], which our `encode` takes, too.
            codes: what `encode` makes of them, where the caller has them already.

        Raises:
            CodesError: the images do not fit the model, or its reconstructions do not fit them.
        """
        codes = self._model.encode(images) if codes is None else codes
        reconstructions = _decoded(self._model, codes)
        images = to_floats(images.to(reconstructions.device))
        if images.shape != reconstructions.shape:
            raise CodesError(
                f"{self._model.name}: decode: expected images of the shape of those that were encoded, {list(images.shape)}, found "
                f"{list(reconstructions.shape)}. Choose a size that it gives back, or mend its decode."
            )
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
        for name, value in _usage(codes, self._model.levels).items():
            self._counts[name] = self._counts.get(name, 0) + value
        return measured

    def report(self) -> dict[str, float]:
        """The figures of all that was added.

        Returns:
            `nmse` (over the variance of this set); `psnr` in dB, of the mean squared error over the whole set, and `psnr_per_image`, the
            mean of each image's own, which is never lower; `ssim`, the mean over images, left out when images are smaller than its
            window; `l1`, mean absolute error of pixels in [-1, 1]; and for each level `{level}/used_codes`, `{level}/perplexity`,
            `{level}/entropy_bits` and `{level}/codebook_size`, with residual quantization for each of its stages `{level}/0`,
            `{level}/1`, .... Reconstructions of ours are measured as `decode` gives them in float32: clamped to [-1, 1], not rounded to
            bytes; those of other people's tokenizers are bytes.

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


def evaluate(model: ImageTokenizer, batches: Iterable[Tensor]) -> dict[str, float]:
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


def _decoded(model: ImageTokenizer, codes: Mapping[str, Tensor]) -> Tensor:
    """Reconstructions, float32 in [-1, 1]: from before they are rounded to bytes, where the model tells."""
    return model.decode(codes, torch.float32) if isinstance(model, Tokenizer) else to_floats(model.decode(codes))


def _usage(codes: Mapping[str, Tensor], levels: Mapping[str, int]) -> dict[str, Tensor]:
    """How often each code occurs, int64 [K], by level; [N, Q, h, w] gives each of the Q stages by itself."""
    found = {}
    for name, values in codes.items():
        stages = (
            {f"{name}/{stage}": part for stage, part in enumerate(values.unbind(1))}
            if values.ndim == 4
            else {name: values}
        )
        found |= {stage: torch.bincount(part.flatten(), minlength=levels[name]) for stage, part in stages.items()}
    return found
