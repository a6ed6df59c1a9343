"""Drawing codes from a prior, one position after another.

`run` knows only the order; what happens at a position is its `select`. Drawing with Gumbel noise is sampling, returning known
codes is likelihood, returning some known codes is inpainting. This `run` is the naive one, a whole forward pass for each position: the
reference for any faster one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from priors.hierarchy import LevelPrior, Prior, inference
from vqmill.errors import CodesError

Select = Callable[[Tensor, int], Tensor]
"""select(logits float [N, K], position in raster order) -> codes int64 [N]."""


def run(level_prior: LevelPrior, batch_size: int, select: Select, condition: Tensor | None) -> Tensor:
    """Fills grids of codes in raster order, in evaluation mode and without gradients.

    Args:
        level_prior: the level's network.
        batch_size: N, how many grids.
        select: called once a position, from 0 to h * w - 1, with the logits of that position given the codes chosen so far.
        condition: what `level_prior.condition` returned for these N samples.

    Returns:
        int64 [N, h, w], the codes that were selected.
    """
    height, width = level_prior.shape.grid
    codes = torch.zeros(batch_size, height, width, dtype=torch.int64, device=level_prior.device)
    with inference(level_prior):
        for position in range(height * width):
            row, column = divmod(position, width)
            logits = level_prior(codes, condition)[:, :, row, column]
            codes[:, row, column] = select(logits, position)
    return codes


def gumbel_noise(seed: int, level: int, position: int, samples: range, codebook_size: int) -> Tensor:
    """Standard Gumbel noise that belongs to samples, whatever batch they are in: float32 [N, K].

    Philox4x64 (Salmon et al. 2011) is counted, not stepped: the key is (seed, level), the counter (running, 0, position, sample).

    Args:
        seed: in [0, 2**64).
        level: the level's index, 0 for the coarsest.
        position: in raster order.
        samples: the numbers of the N samples.
        codebook_size: K.
    """
    bits = np.stack(
        [
            np.random.Philox(key=[seed, level], counter=[0, 0, position, sample]).random_raw(codebook_size)
            for sample in samples
        ]
    )
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # inside (0, 1): both logarithms are finite
    return torch.from_numpy((-np.log(-np.log(uniform))).astype(np.float32))


def gumbel_select(level_prior: LevelPrior, samples: range, seed: int, temperature: float) -> Select:
    """The `select` that draws from the model: the largest of logits plus noise is a draw from their softmax (Gumbel 1954).

    Args:
        level_prior: the level that is drawn.
        samples: the numbers of the N samples; their noise belongs to them.
        seed: in [0, 2**63).
        temperature: what the logits are divided by; 0 takes the likeliest code.
    """

    def select(logits: Tensor, position: int) -> Tensor:
        noise = gumbel_noise(seed, level_prior.index, position, samples, level_prior.shape.codebook_size)
        # The same choice as from logits / temperature + noise, with a meaning at temperature 0 too.
        return (logits.float() + temperature * noise.to(logits.device)).argmax(dim=1)

    return select


def sample(
    prior: Prior,
    num: int,
    labels: Tensor | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Draws samples: the coarsest level given the label, then each finer level given those above it.

    A sample is a function of the weights, its label, the seed, the temperature and its number: not of `num` or `batch_size`
    (as far as the device rounds alike for all batch sizes).

    Args:
        prior: any mode; its mode is kept.
        num: how many samples.
        labels: int64 [num] in [-1, num_classes), -1 for any class; None for any class.
        seed: in [0, 2**63).
        temperature: 1 draws from the model, less is more likely and less varied, 0 always takes the likeliest code.
        batch_size: how many samples are drawn at once.
        device: where to compute; the prior is moved there. None: where the prior is.
        progress: called with (codes drawn, codes in all) after each position of each batch.

    Returns:
        Codes by level name, int64 [num, h, w], on the CPU.

    Raises:
        CodesError: an argument is out of its range, or labels are given to a prior that takes none.
    """
    if num < 1 or batch_size < 1:
        raise CodesError(f"expected num and batch_size of at least 1, found {num} and {batch_size}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise CodesError(f"temperature: expected a number of at least 0, found {temperature}.")
    if not 0 <= seed < 2**63:
        raise CodesError(f"seed: expected a whole number in [0, 2**63), found {seed}.")
    labels = _checked_labels(prior, num, labels)
    if device is not None:
        prior.to(device)
    total = num * sum(level.num_codes for level in prior.config.levels)
    drawn = 0

    def counted(select: Select) -> Select:
        def select_and_tell(logits: Tensor, position: int) -> Tensor:
            nonlocal drawn
            drawn += len(logits)
            if progress is not None:
                progress(drawn, total)
            return select(logits, position)

        return select_and_tell

    batches: list[dict[str, Tensor]] = []
    for start in range(0, num, batch_size):
        samples = range(start, min(start + batch_size, num))
        codes: dict[str, Tensor] = {}
        for name in prior.levels:
            level_prior = prior.level_prior(name)
            with inference(level_prior):
                label = None if labels is None else labels[start : samples.stop].to(level_prior.device)
                condition = level_prior.condition(label, codes)
            select = gumbel_select(level_prior, samples, seed, temperature)
            codes[name] = run(level_prior, len(samples), counted(select), condition)
        batches.append({name: values.cpu() for name, values in codes.items()})
    return {name: torch.cat([batch[name] for batch in batches]) for name in prior.levels}


def _checked_labels(prior: Prior, num: int, labels: Tensor | None) -> Tensor | None:
    """The labels to condition on: int64 [num], or None for a prior that takes none."""
    num_classes = prior.config.num_classes
    if not num_classes:
        if labels is not None:
            raise CodesError(
                "labels were given, but this prior was trained without them. Sample without a label, or train one with."
            )
        return None
    if labels is None:
        return torch.full((num,), -1)
    if tuple(labels.shape) != (num,) or labels.is_floating_point():
        raise CodesError(f"labels: expected {num} whole numbers, found {labels.dtype} {list(labels.shape)}.")
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if len(wrong):
        raise CodesError(f"labels: expected 0..{num_classes - 1} (or -1 for any class), found {int(wrong[0])}.")
    return labels.long()
