"""Nearest codebook entries, without ever holding more than one cache-sized block of distances."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 1 << 21  # scores held at a time: 8 MiB of float32, which stays in the cache that cores share
BLOCK_ROWS = 4096  # at most, so that a call with few vectors, which is padded to a block, stays cheap
PART_NUMBERS = 1 << 20  # of a codebook searched at a time: oneDNN's copy of them takes 4 MiB
BLOCK_SCORES_DEVICE = 1 << 26  # on an accelerator, large enough to fill it
INTERLEAVED_NUMBERS = (
    1 << 17
)  # of a codebook that is copied in another order: 512 KiB. With more, strided reductions lose
MIN_GROUPS = 32  # two vector registers of 16 scores; with fewer, torch reduces one number at a time

_log = logging.getLogger(__name__)
_onednn_products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - made when torch is imported


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Which entry lies nearest to each vector, by Euclidean distance; the lowest index wins ties.

    |z - c|^2 = |z|^2 - 2 (z . c - |c|^2 / 2), so the nearest entry has the highest z . c - |c|^2 / 2.

    On the CPU all blocks have the same number of rows, the last one padded: matrix products of other shapes may round differently,
    and the code of a vector must not depend on the vectors beside it. There the products are exact float32, whatever the caller
    has set for torch's float32 products.

    Args:
        z: float32 [M, D].
        codebook: float32 [K, D], K >= 1.

    Returns:
        int64 [M] in [0, K).

    >>> nearest(torch.tensor([[0.9], [-3.0]]), torch.tensor([[0.0], [1.0], [1.0]]))
    tensor([1, 0])
    """
    if z.device.type == "cpu":
        with _exact:
            return _nearest_on_cpu(z, codebook)
    rows = max(1, BLOCK_SCORES_DEVICE // len(codebook))
    half_norms = _half_norms(codebook)
    blocks = [torch.addmm(half_norms, block, codebook.T).argmax(dim=1) for block in z.split(rows)]
    return torch.cat(blocks)  # argmax gives the first of equal maxima


def _nearest_on_cpu(z: Tensor, codebook: Tensor) -> Tensor:
    """Searches one part of the codebook after the other, so that memory does not grow with it; a later part must have a better score."""
    parts = codebook.split(max(1, PART_NUMBERS // codebook.shape[1]))
    codes, best = _nearest_in_part(z, parts[0])
    for number, part in enumerate(parts[1:], start=1):
        others, scores = _nearest_in_part(z, part)
        better = scores > best
        codes = torch.where(better, others + number * len(parts[0]), codes)
        best = torch.where(better, scores, best)
    return codes


def _nearest_in_part(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the best group of entries first, by a reduction that uses vector registers, and then the best entry in that group alone.

    A group is `members` consecutive codes, so the first best member of the first best group is the lowest index. Columns of scores
    are in the order (member, group), which torch reduces fastest, where groups are few and the copy of the codebook is small; else in
    the order of codes. A last group that is not full repeats the last entry, whose copies lose ties to it.

    Returns:
        Codes, int64 [M], and their scores z . c - |c|^2 / 2, float32 [M].
    """
    last = len(codebook) - 1
    interleaved = codebook.numel() <= INTERLEAVED_NUMBERS
    members = min(32, max(1, len(codebook) // MIN_GROUPS)) if interleaved else 128
    groups = -(-len(codebook) // members)
    if fill := groups * members - len(codebook):
        codebook = torch.cat([codebook, codebook[-1:].expand(fill, -1)])
    if interleaved:
        codebook = codebook.view(groups, members, -1).transpose(0, 1).reshape(groups * members, -1)
    shape, dim = ((members, groups), 1) if interleaved else ((groups, members), 2)
    group_step, member_step = (1, groups) if interleaved else (members, 1)
    places = torch.arange(members) * member_step
    rows = max(1, min(BLOCK_ROWS, BLOCK_SCORES // len(codebook)))
    score = _products()(codebook, _half_norms(codebook), rows)
    codes, best = torch.empty(len(z), dtype=torch.int64), torch.empty(len(z))
    for block, found, value in zip(z.split(rows), codes.split(rows), best.split(rows), strict=True):
        missing = rows - len(block)
        scores = score(F.pad(block, (0, 0, 0, missing)) if missing else block.contiguous())
        group = scores.view(rows, *shape).amax(dim=dim).argmax(dim=1)  # argmax gives the first of equal maxima
        highest, member = scores.gather(1, group[:, None] * group_step + places).max(dim=1)
        found.copy_(group.mul_(members).add_(member)[: len(block)].clamp_(max=last))
        value.copy_(highest[: len(block)])
        del scores, group, member, highest  # before the next are made, so that they take the same memory
    return codes, best


def _half_norms(codebook: Tensor) -> Tensor:
    """-|c|^2 / 2 of each entry, float32 [K]; in parts, because the squares of a large codebook would be another one."""
    return torch.cat([part.square().sum(dim=1).mul_(-0.5) for part in codebook.split(256)])


Scores = Callable[[Tensor], Tensor]  # x [rows, D] -> x C^T + b [rows, K]


def _by_linear(codebook: Tensor, bias: Tensor, rows: int) -> Scores:
    return lambda x: F.linear(x, codebook, bias)


def _by_onednn(codebook: Tensor, bias: Tensor, rows: int) -> Scores:
    large = codebook.numel() > INTERLEAVED_NUMBERS  # then it is worth while to reorder it once, not for every block
    packed = torch.ops.mkldnn._reorder_linear_weight(codebook, rows) if large else codebook
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@cache
def _products() -> Callable[[Tensor, Tensor, int], Scores]:
    """How to compute x C^T + b: by oneDNN where torch has it, which is about 2 x as fast as MKL on some CPUs, or as torch chooses.

    Torch offers oneDNN's float32 product only to its compiler, by operations whose names may change. So they are tried once.
    """
    whole, bias = torch.arange(64.0).view(16, 4), torch.arange(16.0)  # whole numbers: all orders of summing are equal
    try:
        if torch.equal(_by_onednn(whole, bias, len(whole))(whole), F.linear(whole, whole, bias)):
            return _by_onednn
        reason = "its results differ"
    except (AttributeError, RuntimeError, TypeError) as error:  # no such operation, no oneDNN, or other arguments
        reason = str(error).partition("\n")[0]
    _log.info("nearest codes: oneDNN's linear layer cannot be used (%s); F.linear is, which may be slower", reason)
    return _by_linear


class _Exact:
    """While any thread is inside: float32 products of oneDNN without bfloat16 or TF32, also for a caller who has allowed these.

    The setting is one for the whole process, so the first thread in changes it and the last one out restores it; products that others
    run meanwhile are exact too. For callers who allow nothing, it is not touched. What it inherits from a wider setting, it inherits
    again afterwards. Not safe is only to change the setting in one thread while another one searches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside and (found := _onednn_products.fp32_precision) not in ("none", "ieee"):
                self._restore = "none" if found == torch.backends.mkldnn.fp32_precision else found
                _onednn_products.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._restore:
                _onednn_products.fp32_precision = self._restore
                self._restore = None


_exact = _Exact()
