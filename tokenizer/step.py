"""The training step of a tokenizer: its loss, what it reports, and how its codebooks move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.evaluation import Evaluation
from tokenizer.metrics import nmse, perplexity
from tokenizer.models import Tokenizer
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
    def update(self, sums: Mapping[str, Tensor], pools: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Moves codebooks and data variance; after the optimizer's step, with what `forward` gave, reduced over all ranks."""
        self.pixel_sums += sums["pixels"].to(self.pixel_sums)
        for name, quantizer in self.tokenizer.quantizers.items():
            quantizer.update(sums[f"{name}/counts"], sums[f"{name}/sums"], pools[name], generator)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Measures reconstructions, from their codes, and codebook use over a whole set; moves nothing.

        Args:
            batches: `images`, as for `forward`; other entries are not looked at.

        Returns:
            `loss` (nmse + beta x commitment), and the figures of `tokenizer.evaluation.Evaluation.report`.

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
        evaluation = Evaluation(self.tokenizer)
        commitment = torch.zeros_like(self.pixel_sums[0])  # weighted by images
        num_images = 0
        for batch in batches:
            images = self.tokenizer.prepare(batch["images"].to(self.pixel_sums.device))
            levels = self.tokenizer(images).levels
            evaluation.add(images, {name: level.codes for name, level in levels.items()})  # as `encode` gives them
            commitment += torch.stack([level.loss for level in levels.values()]).sum() * len(images)
            num_images += len(images)
        report = evaluation.report()
        loss = report["nmse"] + self.tokenizer.config.commitment_cost * float(commitment) / num_images
        return {"loss": loss, **report}


def _pixel_sums(images: Tensor) -> Tensor:
    """float64 [3]: how many numbers, their sum, their sum of squares."""
    count = torch.tensor(images.numel(), dtype=torch.float64, device=images.device)
    return torch.stack([count, images.sum(dtype=torch.float64), images.double().square().sum()])


def _variance(pixel_sums: Tensor) -> Tensor:
    count, total, squares = pixel_sums
    return squares / count - (total / count).square()
