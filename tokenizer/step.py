"""The training step of a tokenizer: its loss, what it reports, and how its codebooks move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.evaluation import Evaluation
from tokenizer.losses import reconstruction_loss
from tokenizer.metrics import nmse, perplexity
from tokenizer.models import Reconstruction, Tokenizer
from vqmill.step import StepOutput

UNIFORM_VARIANCE = 1 / 3  # of pixels uniform in [-1, 1]; stands in until the first update


class TokenizerStep(nn.Module):
    """One step of training a tokenizer; see `vqmill.step` for the contract.

    The loss is the reconstruction loss (`tokenizer.losses`) + the quantizers' losses (van den Oord et al. 2017, eq. 3) + those of the
    architecture's own. `mse` is divided by the variance of the data, as in sonnet, so that beta means the same for every corpus. The
    variance is that of all pixels that training has seen so far, which lies in a buffer and moves only in `update`.
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
        loss, parts = self._loss(images, result, self.data_variance)
        error = nmse(F.mse_loss(result.images.detach(), images), self.data_variance)
        metrics = {"loss": loss.detach(), "nmse": error, **{name: part.detach() for name, part in parts.items()}}
        sums, pools = {"pixels": _pixel_sums(images)}, {}
        for name, level in result.levels.items():
            metrics[f"{name}/batch_perplexity"] = perplexity(level.counts).mean().float()
            if self.tokenizer.quantizers[name].learned:
                sums[f"{name}/counts"], sums[f"{name}/sums"] = level.counts, level.sums
                pools[name] = level.pool
        return StepOutput(loss=loss, metrics=metrics, sums=sums, pools=pools)

    def _loss(self, images: Tensor, result: Reconstruction, variance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole loss, and its parts by name."""
        parts = {
            "reconstruction": reconstruction_loss(
                self.tokenizer.config.loss, result.outputs, self.tokenizer.stack(images), variance
            ),
            "quantization": torch.stack([level.loss for level in result.levels.values()]).sum(),
        }
        if result.auxiliary is not None:
            parts["auxiliary"] = result.auxiliary
        return torch.stack(list(parts.values())).sum(), parts

    @torch.no_grad()
    def update(
        self, sums: Mapping[str, Tensor], pools: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Moves codebooks and data variance; after the optimizer's step, with what `forward` gave, reduced over all ranks.

        Returns:
            By name of a parameter, bool [K]: rows that were replaced, of which the optimizer must forget what it knows.
        """
        self.pixel_sums += sums["pixels"].to(self.pixel_sums)
        replaced = {}
        for name, quantizer in self.tokenizer.quantizers.items():
            if quantizer.learned:
                found = quantizer.update(sums[f"{name}/counts"], sums[f"{name}/sums"], pools[name], generator)
                replaced |= {f"tokenizer.net.levels.{name}.{part}": mask for part, mask in found.items()}
        learned = dict(self.named_parameters())
        return {name: mask for name, mask in replaced.items() if name in learned}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Measures reconstructions, from their codes, and codebook use over a whole set; moves nothing.

        Args:
            batches: `images`, as for `forward`; other entries are not looked at.

        Returns:
            `loss` (the training loss), and the figures of `tokenizer.evaluation.Evaluation.report`.

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
        loss = torch.zeros_like(self.pixel_sums[0])  # weighted by images
        num_images = 0
        for batch in batches:
            images = self.tokenizer.prepare(batch["images"].to(self.pixel_sums.device))
            result = self.tokenizer(images)
            codes = {name: level.codes for name, level in result.levels.items()}  # those of `encode`, but for near-ties
            evaluation.add(images, codes)
            loss += self._loss(images, result, self.data_variance)[0] * len(images)
            num_images += len(images)
        return {"loss": float(loss) / max(1, num_images), **evaluation.report()}


def _pixel_sums(images: Tensor) -> Tensor:
    """float64 [3]: how many numbers, their sum, their sum of squares."""
    count = torch.tensor(images.numel(), dtype=torch.float64, device=images.device)
    return torch.stack([count, images.sum(dtype=torch.float64), images.double().square().sum()])


def _variance(pixel_sums: Tensor) -> Tensor:
    count, total, squares = pixel_sums
    return squares / count - (total / count).square()
