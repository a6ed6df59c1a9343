"""The training step of a prior: one level at a time, on codes from a store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from priors.hierarchy import Prior
from priors.level import LevelPrior, inference
from priors.likelihood import level_nats
from vqmill.errors import CodesError
from vqmill.step import StepOutput


class PriorStep(nn.Module):
    """Maximum likelihood of one level's codes, given the label and the true codes of the coarser levels.

    The level's network is shared with `prior`, so training the step trains the prior; other levels are not touched and are not
    in `state_dict()`.

    Args:
        prior: the whole prior.
        level: the name of the level to train.
    """

    def __init__(self, prior: Prior, level: str) -> None:
        super().__init__()
        self.level_prior: LevelPrior = prior.level_prior(level)

    def forward(self, batch: Mapping[str, Tensor]) -> StepOutput:
        """The loss of a micro-batch: nats per code, with `bits_per_code` beside it.

        In training mode dropout and hidden labels draw from torch's global generator: the trainer seeds it before each step, so that a
        resumed run draws what an uninterrupted one would have.

        Args:
            batch: this and all coarser levels by name, integers of any kind [N, h, w]; `label` int64 [N] unless num_classes is 0.
        """
        loss = level_nats(self.level_prior, batch).mean()
        return StepOutput(loss=loss, metrics={"bits_per_code": loss.detach() / math.log(2)})

    def update(
        self, sums: Mapping[str, Tensor], pools: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Does nothing: a prior has no statistics beside its weights. Part of what the trainer expects of a step."""
        return {}

    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Mean over all codes of all batches, without dropout: `loss` in nats per code and `bits_per_code`.

        Raises:
            CodesError: there are no batches.
        """
        total, count = 0.0, 0
        with inference(self):
            for batch in batches:
                nats = level_nats(self.level_prior, batch)
                total += float(nats.double().sum())
                count += nats.numel()
        if not count:
            raise CodesError("nothing to evaluate a prior on: expected at least one batch of codes.")
        return {"loss": total / count, "bits_per_code": total / count / math.log(2)}
