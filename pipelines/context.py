"""Where a training loop runs: alone, or as one rank of a Ray Train job. The loop itself cannot tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Context(Protocol):
    """What `fit` asks of its surroundings.

    Attributes:
        rank: this process's number, from 0.
        world_size: how many ranks there are.
        device: where to compute.
        restart: how often all ranks were started again because one was lost.
    """

    rank: int
    world_size: int
    device: torch.device
    restart: int

    def wrap(self, step: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over ranks."""
        ...

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor added over ranks."""
        ...

    def gather(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor [P, D] concatenated over ranks, in their order."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in their order."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Called by all ranks equally often."""
        ...


@dataclass
class LocalContext:
    """One process."""

    device: torch.device
    rank: int = field(default=0, init=False)
    world_size: int = field(default=1, init=False)
    restart: int = field(default=0, init=False)

    def wrap(self, step: nn.Module) -> nn.Module:
        """The module itself."""
        return step

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values themselves."""
        return dict(values)

    def gather(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values themselves."""
        return dict(values)

    def collect(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody listens."""


@dataclass
class RankContext:
    """One rank of a torch process group, as Ray Train sets it up."""

    device: torch.device
    reporter: Any  # ray.train.report
    restart: int = 0
    rank: int = field(init=False)
    world_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def wrap(self, step: nn.Module) -> nn.Module:
        """DistributedDataParallel; buffers are left alone, because `update` moves them alike on every rank."""
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(step, device_ids=devices, broadcast_buffers=False)

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All-reduce."""
        total = {name: value.clone() for name, value in sorted(values.items())}
        for value in total.values():
            dist.all_reduce(value)
        return total

    def gather(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All-gather; every rank brings the same number of rows."""
        gathered = {}
        for name, value in sorted(values.items()):
            parts = [torch.empty_like(value) for _ in range(self.world_size)]
            dist.all_gather(parts, value.contiguous())
            gathered[name] = torch.cat(parts)
        return gathered

    def collect(self, value: Any) -> list[Any]:
        """Sent as JSON text, padded to one length, through the same all-gather as tensors."""
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        lengths = self.gather({"length": torch.tensor([len(text)], device=self.device)})["length"]
        padded = nn.functional.pad(text, (0, int(lengths.max()) - len(text)))
        texts = self.gather({"text": padded[None]})["text"].cpu()
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(texts, lengths.tolist(), strict=True)]

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells Ray Train."""
        self.reporter(dict(metrics))
