"""What one training step returns: the contract between models and the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class StepOutput:
    """The result of one pure forward pass over a micro-batch.

    Attributes:
        loss: scalar float, mean over the micro-batch; what is differentiated.
        metrics: detached scalars by name, for the log.
        sums: tensors that are added over micro-batches and ranks before `update()` (for example how often each code was used).
        pools: tensors [P, D] that are concatenated over micro-batches and ranks before `update()` (for example encoder outputs
            from which unused codes are revived).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)
    pools: dict[str, Tensor] = field(default_factory=dict)
