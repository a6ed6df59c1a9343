"""A prior over one grid of codes, given a label and the coarser levels: what is known first, then a network over the codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

from priors.blocks import UpperCondition
from priors.cached import GatedSession
from priors.config import PriorConfig
from priors.gated import GatedNetwork
from priors.gpt import GPTNetwork, GPTSession
from priors.network_config import PixelCNNConfig
from vqmill.errors import CodesError


class LevelPrior(nn.Module):
    """p(codes | label, coarser levels) of one level.

    Args:
        config: the whole prior's configuration.
        index: which of its levels, 0 for the coarsest.
    """

    def __init__(self, config: PriorConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.shape, network = config.levels[index], config.networks[index]
        self.num_classes = config.num_classes
        self.label_dropout = network.label_dropout
        depth, uppers = network.depth, config.levels[:index]
        norm = network.norm if isinstance(network, PixelCNNConfig) else True
        self.uppers = nn.ModuleList(
            UpperCondition(upper, self.shape, depth, network.num_condition_blocks, norm, network.dropout) for upper in uppers
        )  # fmt: skip
        self.upper_names = tuple(upper.name for upper in uppers)
        # Row 0 stands for label -1, so that a label out of its range is an index error and not another label.
        self.label_embedding = nn.Embedding(config.num_classes + 1, depth) if config.num_classes else None
        self.network: GatedNetwork | GPTNetwork
        if isinstance(network, PixelCNNConfig):
            self.network = GatedNetwork(network, self.shape, conditioned=bool(uppers or config.num_classes))
        else:
            self.network = GPTNetwork(network, self.shape)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where codes and labels must be."""
        return self.network.embedding.weight.device

    def condition(self, label: Tensor | None, upper: Mapping[str, Tensor]) -> Tensor | None:
        """Everything known before the first code, computed once for a batch.

        In training mode labels are hidden with the configured probability.

        Args:
            label: int64 [N] in [-1, num_classes), -1 for "any"; None when the prior takes no label.
            upper: codes of all coarser levels by name, int64 [N, h, w]; other names are not looked at.

        Returns:
            float [N, depth, h, w] when there are coarser levels, float [N, depth] when there is only a label, None when neither.

        Raises:
            CodesError: a coarser level is missing, or a label is given to a prior without labels, or none to one with.
        """
        missing = [name for name in self.upper_names if name not in upper]
        if missing:
            raise CodesError(
                f"level '{self.shape.name}' is conditioned on {', '.join(missing)}, whose codes were not given."
            )
        if (label is None) != (self.label_embedding is None):
            expected = "no label" if self.label_embedding is None else "labels (-1 for any class)"
            raise CodesError(f"a prior with num_classes {self.num_classes} expects {expected}.")
        parts: list[Tensor] = [net(upper[name]) for name, net in zip(self.upper_names, self.uppers, strict=True)]
        if label is not None and self.label_embedding is not None:
            if self.training and self.label_dropout:
                label = label.masked_fill(torch.rand(label.shape, device=label.device) < self.label_dropout, -1)
            embedded = self.label_embedding(label + 1)
            parts.append(embedded[:, :, None, None] if parts else embedded)
        return reduce(torch.add, parts) if parts else None

    def forward(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Logits of every code given those before it in raster order.

        Args:
            codes: int64 [N, h, w] in [0, K). Codes at a position and after it have no influence on that position's logits.
            condition: what `condition()` returned for the same samples.

        Returns:
            float [N, K, h, w].

        Raises:
            CodesError: the grid is not the one that this level was made for.
        """
        height, width = self.shape.grid
        if tuple(codes.shape[1:]) != (height, width):
            raise CodesError(
                f"level '{self.shape.name}': expected codes [N, {height}, {width}], found {list(codes.shape)}."
            )
        return self.network(codes, condition)

    def session(self, batch_size: int, condition: Tensor | None) -> GatedSession | GPTSession:
        """Computes the logits of `forward` place by place, for `priors.running.run`; in evaluation mode, without gradients.

        Args:
            batch_size: N, how many grids.
            condition: what `condition()` returned for them.
        """
        return self.network.session(batch_size, condition)


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside, the former mode again afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
