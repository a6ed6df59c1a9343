"""The training step of a tokenizer: its loss, what it reports, and how its codebooks move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.metrics import nmse, perplexity, psnr, used_codes
from tokenizer.models import Tokenizer
from vqmill.errors import CodesError
from vqmill.step import StepOutput

UNIFORM_VARIANCE = 1 / 3  # of pixels uniform in [-1, 1]; stands in until the first update


class TokenizerStep(nn.Module):
    """One step of training a tokenizer; see `vqmill.step` for the contract.

    The loss is MSE / variance of the data + beta x the commitment losses (van den Oord et al. 2017, eq. 3, scaled as in sonnet, so
    that beta means the same for every corpus). The variance is that of all pixels that training has seen so far, which lies in
    a buffer and moves only in `update`.
    """

    pixel_sums: Tensor

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("pixel_sums", torch.zeros(3, dtype=torch.float64))  # how many, their sum, sum of squares

    @property
    def data_variance(self) -> Tensor:
        """float32 scalar: the variance of the pixels, in [-1, 1], of all training images so far."""
        known = self.pixel_sums[0] > 0
        return torch.where(known, _variance(self.pixel_sums), UNIFORM_VARIANCE).float()

    def forward(self, batch: Mapping[str, Tensor]) -> StepOutput:
        """Loss and statistics of one micro-batch; pure.

        Args:
            batch: `images`, uint8 [B, C, S, S] in [0, 255] or float in [-1, 1]; other entries are not looked at.
        """
        images = self.tokenizer.prepare(batch["images"])
        result = self.tokenizer(images)
        error = nmse(F.mse_loss(result.images.float(), images), self.data_variance)
        commitment = torch.stack([level.loss for level in result.levels.values()]).sum()
        loss = error + self.tokenizer.config.commitment_cost * commitment
        metrics = {"loss": loss.detach(), "nmse": error.detach(), "commitment": commitment.detach()}
        sums, pools = {"pixels": _pixel_sums(images)}, {}
        for name, level in result.levels.items():
            metrics[f"{name}/batch_perplexity"] = perplexity(level.counts).float()
            sums[f"{name}/counts"], sums[f"{name}/sums"] = level.counts, level.sums
            pools[name] = level.pool
        return StepOutput(loss=loss, metrics=metrics, sums=sums, pools=pools)

    @torch.no_grad()
    def update(
        self, sums: Mapping[str, Tensor], pools: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Moves codebooks and data variance; after the optimizer's step, with what `forward` gave, reduced over all ranks."""
        self.pixel_sums += sums["pixels"].to(self.pixel_sums)
        for name, quantizer in self.tokenizer.quantizers.items():
            quantizer.update(sums[f"{name}/counts"], sums[f"{name}/sums"], pools[name], generator)
        return {}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Measures reconstructions and codebook use over a whole set; moves nothing.

        Returns:
            `loss` (nmse + beta x commitment), `nmse` (over the variance of this set), `psnr` in dB, and for each level
            `{level}/used_codes`, `{level}/perplexity` and `{level}/codebook_size`. Reconstructions are clamped to [-1, 1].

        Raises:
            CodesError: there is no batch.
        """
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            return self._evaluate(batches)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        config, device = self.tokenizer.config, self.pixel_sums.device
        squared_error = torch.zeros((), dtype=torch.float64, device=device)
        commitment = torch.zeros_like(squared_error)  # weighted by images
        pixels = torch.zeros_like(self.pixel_sums)
        counts = {
            name: torch.zeros(config.codebook_size, dtype=torch.float64, device=device) for name in config.level_names
        }
        num_images = 0
        for batch in batches:
            images = self.tokenizer.prepare(batch["images"].to(device))
            result = self.tokenizer(images)
            squared_error += (result.images.float().clamp(-1, 1) - images).square().sum(dtype=torch.float64)
            pixels += _pixel_sums(images)
            num_images += len(images)
            for name, level in result.levels.items():
                counts[name] += level.counts
                commitment += level.loss * len(images)
        if num_images == 0:
            raise CodesError(
                "nothing to evaluate on: expected at least one batch of images. Hold out more of the corpus."
            )
        mse = squared_error / pixels[0]
        error = nmse(mse, _variance(pixels))
        report = {"loss": error + config.commitment_cost * commitment / num_images, "nmse": error, "psnr": psnr(mse)}
        for name in config.level_names:
            report[f"{name}/used_codes"] = used_codes(counts[name])
            report[f"{name}/perplexity"] = perplexity(counts[name])
            report[f"{name}/codebook_size"] = torch.tensor(config.codebook_size)
        return {name: float(value) for name, value in report.items()}


def _pixel_sums(images: Tensor) -> Tensor:
    """float64 [3]: how many numbers, their sum, their sum of squares."""
    count = torch.tensor(images.numel(), dtype=torch.float64, device=images.device)
    return torch.stack([count, images.sum(dtype=torch.float64), images.double().square().sum()])


def _variance(pixel_sums: Tensor) -> Tensor:
    count, total, squares = pixel_sums
    return squares / count - (total / count).square()
