"""What one training step returns: the contract between models and the trainer.

A step is an nn.Module with three methods. `forward(batch) -> StepOutput` is pure. `update(sums, pools, generator) -> dict[str, Tensor]`
is called after the optimizer, on all ranks alike, with what `forward` gave, reduced over micro-batches and ranks; it moves what
gradients do not, and returns which rows of which trained parameters it has replaced (revived codes of a gradient codebook): by the
parameter's name in the step's `named_parameters()`, bool [K] over its rows; `{}` for none. Of these rows the trainer clears the
optimizer's moments (`exp_avg`, `exp_avg_sq`) and restarts the running average, which belong to entries that are gone.
`evaluate(batches) -> dict[str, float]` measures a held-out set, `loss` among others, and moves nothing.
"""

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
