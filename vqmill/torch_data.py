"""Batches as torch tensors, for people who have a DataLoader. The one module of this package that needs torch at import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from vqmill.errors import CodesError
from vqmill.mix import MixedBatches
from vqmill.store import Codes

TensorBatch = dict[str, torch.Tensor]


class CodesDataset(IterableDataset[TensorBatch]):
    """Batches of `Codes.batches` as tensors: `{"top": int64 [B, h, w], ..., "label": int64 [B], "row": int64 [B]}`.

    Use it as it is, or as `DataLoader(dataset, batch_size=None)`. It reads ahead in threads of its own; worker processes are refused,
    because handing decoded batches from process to process costs many times what decoding them does.
    """

    def __init__(
        self, codes: Codes | Sequence[tuple[Codes, float]], batch_size: int, *, rank: int | None = None, world_size: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype = torch.int64, **options: Any,
    ) -> None:  # fmt: skip
        """Nothing is read yet.

        Args:
            codes: an open store, or several with a weight each (`MixedBatches`: without end).
            batch_size: rows of a batch on this rank.
            rank: of this process; if not given, that of torch.distributed when it is initialised, else 0.
            world_size: number of processes; the same.
            device: where the tensors shall be. For CUDA, batches are gathered in pinned memory and copied without waiting for the copy.
            dtype: of the codes; embeddings take int64 and int32.
            options: those of `Codes.batches` (or `MixedBatches`): shuffle, seed, last, levels, rows, pool_bytes, threads.

        Raises:
            CodesError: an option out of its range.
        """
        super().__init__()
        if (rank is None) != (world_size is None):
            raise CodesError("rank and world_size belong together: give both, or neither.")
        if rank is None or world_size is None:
            joined = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)
        self._device = torch.device(device) if device is not None else torch.device("cpu")
        self._dtype = dtype
        place = {"rank": rank, "world_size": world_size}
        self._batches = (
            codes.batches(batch_size, **place, **options)
            if isinstance(codes, Codes)
            else MixedBatches(codes, batch_size, **place, **options)
        )

        for level in (codes if isinstance(codes, Codes) else codes[0][0]).spec.levels:
            if not _holds(dtype, level.codebook_size - 1):
                raise CodesError(
                    f"dtype {dtype} cannot hold the codes 0..{level.codebook_size - 1} of level '{level.name}'."
                )

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        if isinstance(self._batches, MixedBatches):
            raise TypeError("mixed stores give batches without end")
        return len(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; see `CodeBatches.state_dict`."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on there; see `CodeBatches.load_state_dict`."""
        self._batches.load_state_dict(state)

    def __iter__(self) -> Iterator[TensorBatch]:
        if get_worker_info() is not None:
            raise CodesError(
                "CodesDataset reads in threads of its own: use DataLoader(dataset, batch_size=None, num_workers=0)."
            )
        for batch in self._batches.iterate(self._empty):
            yield {name: self._tensor(name, values) for name, values in batch.items()}

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        kind = _from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=self._device.type == "cuda").numpy()

    def _tensor(self, name: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = _from_numpy(values).to(self._device, non_blocking=True)
        return tensor if name in ("label", "row", "store") else tensor.to(self._dtype)


def _holds(dtype: torch.dtype, largest: int) -> bool:
    """Whether every code up to the largest is a value of its own in a dtype."""
    if dtype == torch.bool or dtype.is_complex:
        return False
    return largest <= (2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max)


def _from_numpy(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]
