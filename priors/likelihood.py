"""How well codes are predicted: negative log-likelihoods, scores of samples, and baselines that any prior must beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from priors.hierarchy import Prior
from priors.level import LevelPrior, inference
from vqmill.errors import CodesError


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """-ln p of each code: float [N, K, h, w] and int64 [N, h, w] -> float32 [N, h, w]. In fp32 also under autocast."""
    return F.cross_entropy(logits.float(), codes, reduction="none")


def level_nats(level_prior: LevelPrior, batch: Mapping[str, Tensor]) -> Tensor:
    """-ln p of each code of one level of a batch from a store: float32 [N, h, w].

    Args:
        level_prior: the level's network, in the mode that is wanted.
        batch: this and all coarser levels by name, integers of any kind [N, h, w]; `label` int64 [N] unless num_classes is 0.

    Raises:
        CodesError: a level or the label is missing from the batch, or a label is none of the classes.
    """
    wanted = [*level_prior.upper_names, level_prior.shape.name, *(["label"] if level_prior.num_classes else [])]
    missing = [name for name in wanted if name not in batch]
    if missing:
        raise CodesError(
            f"level '{level_prior.shape.name}': the batch lacks {', '.join(missing)}; it has {', '.join(batch)}."
        )
    integers = {name: batch[name].long() for name in wanted}
    _check_labels(level_prior, integers.get("label"))
    codes = integers[level_prior.shape.name]
    return code_nats(level_prior(codes, level_prior.condition(integers.get("label"), integers)), codes)


def _check_labels(level_prior: LevelPrior, labels: Tensor | None) -> None:
    """Only where it is cheap: a wrong label is an error on a GPU too, but one that says little."""
    if labels is not None and labels.device.type == "cpu" and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= level_prior.num_classes:
            raise CodesError(
                f"labels: expected 0..{level_prior.num_classes - 1} (or -1 for any class), found {low if low < -1 else high}."
            )


def score(prior: Prior, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How surprising each sample is, level by level: bits per sample, float64 [N]. Their sum over levels is -log2 p(sample | label).

    Args:
        prior: any mode; its mode is kept.
        batch: all levels by name, integers [N, h, w]; `label` int64 [N] unless the prior takes none.
    """
    return {name: values.flatten(1).double().sum(1) for name, values in bits_per_code(prior, batch).items()}


def bits_per_code(prior: Prior, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How surprising each code is: -log2 of its probability given the label and the codes before it, float32 [N, h, w] by level.

    Args:
        prior: any mode; its mode is kept.
        batch: as for `score`.
    """
    with inference(prior):
        return {name: level_nats(prior.level_prior(name), batch) / math.log(2) for name in prior.levels}


@dataclass(frozen=True)
class Baselines:
    """Bits per code of models that know nothing about images.

    Attributes:
        uniform: every code equally likely, log2 K.
        unigram: each code by how often it is used, wherever it stands.
        bigram: each code by what stands left of it (above it in the first column), falling back on the unigram.
    """

    uniform: float
    unigram: float
    bigram: float


def baselines(codes: np.ndarray[Any, Any], codebook_size: int, train: np.ndarray[Any, Any] | None = None) -> Baselines:
    """Bits per code of the uniform, unigram and bigram models.

    Args:
        codes: integers [N, h, w] in [0, K), what is predicted. Some 60 bytes of memory are used for each code.
        codebook_size: K.
        train: integers [M, h, w], where the counts come from. None: from `codes`, each code being predicted from all the
            others (leave-one-out), so that a large table does not look good by remembering.

    Raises:
        CodesError: no codes, not three axes, or a code out of its range.

    Example:
        >>> baselines(np.zeros((8, 4, 4), np.uint8), 4).uniform
        2.0
    """
    source = codes if train is None else train
    for array in (codes,) if train is None else (codes, train):
        _check_codes(array, codebook_size)
    own = 1 if train is None else 0
    before, after = _neighbours(codes)
    source_before, source_after = (before, after) if train is None else _neighbours(train)

    counts = np.bincount(source.reshape(-1), minlength=codebook_size)
    # Half a count for every code (Krichevsky and Trofimov 1981): a code never seen in `train` costs bits, not infinity.
    unigram = (counts - own + 0.5) / (counts.sum() - own + 0.5 * codebook_size)  # float64 [K], by code

    # Pairs are counted by sorting, so that memory follows the codes and not K x K.
    source_pairs = _pairs(source_before, source_after, codebook_size)
    wanted = source_pairs if train is None else _pairs(before, after, codebook_size)
    pairs, pair_counts = np.unique(source_pairs, return_counts=True)
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0) - own
    context = np.bincount(source_before, minlength=codebook_size)[before] - own
    # Dirichlet smoothing towards the unigram (MacKay and Peto 1995): as if `strength` codes had been seen after each context.
    strength = math.sqrt(codebook_size)
    paired = (seen + strength * unigram[after]) / (context + strength)
    bigram_bits = -(np.log2(paired).sum() + np.log2(unigram[codes[:, 0, 0]]).sum()) / codes.size
    return Baselines(math.log2(codebook_size), float(-np.log2(unigram[codes]).mean()), float(bigram_bits))


def _check_codes(codes: np.ndarray[Any, Any], codebook_size: int) -> None:
    if codes.ndim != 3 or not codes.size:
        raise CodesError(f"expected codes [N, h, w] with at least one code, found shape {codes.shape}.")
    if int(codes.min()) < 0 or int(codes.max()) >= codebook_size:
        raise CodesError(f"expected codes in [0, {codebook_size}), found {int(codes.min())}..{int(codes.max())}.")


def _neighbours(codes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All pairs (the code before, the code) of [N, h, w], flat, dtype kept: left to right, and downward in the first column."""
    before = np.concatenate([codes[:, :, :-1].reshape(-1), codes[:, :-1, 0].reshape(-1)])
    after = np.concatenate([codes[:, :, 1:].reshape(-1), codes[:, 1:, 0].reshape(-1)])
    return before, after


def _pairs(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any], codebook_size: int) -> np.ndarray[Any, Any]:
    """One int64 in [0, K^2) for each pair of codes."""
    return np.multiply(before, codebook_size, dtype=np.int64) + after
