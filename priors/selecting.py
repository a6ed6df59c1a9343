"""What is done at a position: drawing with noise that belongs to the sample, from what temperature, top-k, top-p and guidance leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from priors.level import LevelPrior
from priors.running import Select
from vqmill.errors import CodesError


@dataclass(frozen=True)
class Drawing:
    """How codes are drawn from the model's probabilities.

    Attributes:
        temperature: what logits are divided by: 1 draws from the model, less is likelier and less varied, 0 takes the likeliest code.
        top_k: only so many of the likeliest codes are drawn (equally likely ones with the last all stay); 0 for all.
        top_p: only the likeliest codes that together have this probability are drawn, in (0, 1]; 1 for all (Holtzman et al. 2019).
        guidance: how strongly a label acts: logits are any + guidance * (label - any), where `any` are those without a label; 1 is the
            model as it is (Ho & Salimans 2022). Needs a prior that was trained with labels and label_dropout; takes twice the time.
        candidates: draws for each sample, of which the one with the highest log p(x | label) - log p(x) is kept: what Razavi et al. 2019
            (section 3.3) reject by a classifier, here by the prior itself.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    candidates: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise CodesError(f"temperature: expected a number of at least 0, found {self.temperature}.")
        if self.top_k < 0:
            raise CodesError(f"top_k: expected a whole number of at least 0 (0 for all codes), found {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise CodesError(f"top_p: expected a probability in (0, 1], found {self.top_p}.")
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise CodesError(f"guidance: expected a number of at least 0 (1 for none), found {self.guidance}.")
        if self.candidates < 1:
            raise CodesError(f"candidates: expected at least 1, found {self.candidates}.")
        if self.candidates > 1 and self.temperature == 0:
            raise CodesError(
                f"candidates {self.candidates} with temperature 0: all of them would be the same. Raise temperature."
            )

    @property
    def compares(self) -> bool:
        """Whether the model without a label is asked too."""
        return self.guidance != 1 or self.candidates > 1


def gumbel_noise(
    seed: int, level: int, position: int, samples: range, codebook_size: int, candidate: int = 0
) -> Tensor:
    """Standard Gumbel noise that belongs to samples, whatever batch they are in: float32 [N, K].

    Philox4x64 (Salmon et al. 2011) is counted, not stepped: the key is (seed, level), the counter (running, candidate, position, sample).

    Args:
        seed: in [0, 2**64).
        level: the level's index, 0 for the coarsest.
        position: in raster order.
        samples: the numbers of the N samples.
        codebook_size: K.
        candidate: which draw for the same sample.
    """
    bits = np.stack(
        [
            np.random.Philox(key=[seed, level], counter=[0, candidate, position, sample]).random_raw(codebook_size)
            for sample in samples
        ]
    )
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # inside (0, 1): both logarithms are finite
    return torch.from_numpy((-np.log(-np.log(uniform))).astype(np.float32))


def gumbel_select(level_prior: LevelPrior, samples: range, seed: int, drawing: Drawing, candidate: int = 0) -> Select:
    """The `select` that draws from the model: the largest of logits plus noise is a draw from their softmax (Gumbel 1954).

    Args:
        level_prior: the level that is drawn.
        samples: the numbers of the N samples; their noise belongs to them.
        seed: in [0, 2**63).
        drawing: how; its guidance and candidates are not looked at.
        candidate: which draw for the same samples.
    """
    temperature, size = drawing.temperature, level_prior.shape.codebook_size

    def select(logits: Tensor, position: int) -> Tensor:
        logits = logits.float()
        if temperature == 0:
            return logits.argmax(dim=1)
        noise = gumbel_noise(seed, level_prior.index, position, samples, size, candidate)
        apart = logits - logits.amax(dim=1, keepdim=True)  # so that a tiny temperature makes -inf of them, never inf
        kept = _likeliest(apart / temperature, drawing.top_k, drawing.top_p)
        return (kept + noise.to(logits.device)).argmax(dim=1)

    return select


def guided(select: Select, guidance: float) -> Select:
    """A `select` for 2 N grids: N with their labels, then the same N without. Both halves get the codes that are chosen."""

    def select_for_both(logits: Tensor, position: int) -> Tensor:
        labelled, free = logits.chunk(2)
        return select(free + guidance * (labelled - free), position).repeat(2)

    return select_for_both


def clamped(select: Select, given: Tensor) -> Select:
    """A `select` that keeps what is given: int64 [N, h, w], -1 where codes are to be chosen."""
    known = given.flatten(1)

    def select_or_keep(logits: Tensor, position: int) -> Tensor:
        here = known[:, position]
        return here if bool((here >= 0).all()) else torch.where(here >= 0, here, select(logits, position))

    return select_or_keep


def _likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits, float32 [N, K], with -inf for codes that are not to be drawn; the likeliest always stays."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        shares = ordered.softmax(dim=1)
        before = shares.cumsum(dim=1) - shares  # of the codes that are likelier
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    return logits
