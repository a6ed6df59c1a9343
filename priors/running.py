"""Visiting the places of grids in raster order: one way through, whatever is done at each place.

`run` knows only the order; what happens at a place is its `select`. Drawing with Gumbel noise is sampling, returning known codes is
likelihood, returning some known codes is inpainting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from priors.level import LevelPrior, inference
from vqmill.errors import CodesError

Select = Callable[[Tensor, int], Tensor]
"""select(logits float [N, K], position in raster order) -> codes int64 [N]."""

Sampler = Literal["cached", "naive"]


class Session(Protocol):
    """The places of N grids, one after another."""

    def step(self, previous: Tensor | None) -> Tensor:
        """Logits float [N, K] of the next place, given the codes int64 [N] of the one before (None at the first)."""
        ...


class NaiveSession:
    """A whole forward pass for each place: the reference for quicker ones."""

    def __init__(self, level_prior: LevelPrior, batch_size: int, condition: Tensor | None) -> None:
        self._level_prior, self._condition, self._place = level_prior, condition, 0
        shape = (batch_size, *level_prior.shape.grid)
        self._codes = torch.zeros(shape, dtype=torch.int64, device=level_prior.device)

    def step(self, previous: Tensor | None) -> Tensor:
        """See `Session`."""
        if previous is not None:
            self._codes.flatten(1)[:, self._place - 1] = previous
        logits = self._level_prior(self._codes, self._condition).flatten(2)[:, :, self._place]
        self._place += 1
        return logits


def run(
    level_prior: LevelPrior, batch_size: int, select: Select, condition: Tensor | None, sampler: Sampler = "cached"
) -> Tensor:
    """Fills grids of codes in raster order, in evaluation mode and without gradients.

    Args:
        level_prior: the level's network.
        batch_size: N, how many grids.
        select: called once a position, from 0 to h * w - 1, with the logits of that position given the codes chosen so far.
        condition: what `level_prior.condition` returned for these N samples.
        sampler: `cached` computes every layer once at each place; `naive` runs the whole network for each. Their logits differ by
            rounding alone.

    Returns:
        int64 [N, h, w], the codes that were selected.

    Raises:
        CodesError: no such sampler.
    """
    codes = torch.empty(batch_size, level_prior.shape.num_codes, dtype=torch.int64, device=level_prior.device)
    if sampler not in ("cached", "naive"):
        raise CodesError(f"sampler: expected cached or naive, found {sampler!r}.")
    with inference(level_prior), torch.autocast(level_prior.device.type, enabled=False):
        session: Session = (
            NaiveSession(level_prior, batch_size, condition)
            if sampler == "naive"
            else level_prior.session(batch_size, condition)
        )
        previous = None
        for position in range(level_prior.shape.num_codes):
            previous = select(session.step(previous), position)
            codes[:, position] = previous
    return codes.unflatten(1, level_prior.shape.grid)


def run_to_fixed_point(
    level_prior: LevelPrior, batch_size: int, select: Select, condition: Tensor | None
) -> tuple[Tensor, int]:
    """Fills grids by whole forward passes, each selecting all codes again from the last guess, until none changes.

    One more position is right after each pass, so there are h * w at most; where codes depend little on each other, fewer
    (Song et al. 2021, "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving"; Wiggers & Hoogeboom 2020).
    A reference beside `run`.

    Args:
        level_prior: as for `run`.
        batch_size: as for `run`.
        select: as for `run`, but called for a position in each pass until the position is certain; it must depend on its arguments alone.
        condition: as for `run`.

    Returns:
        int64 [N, h, w], the codes; and how many passes it took.
    """
    number = level_prior.shape.num_codes
    codes = torch.zeros(batch_size, *level_prior.shape.grid, dtype=torch.int64, device=level_prior.device)
    with inference(level_prior):
        for passes in range(1, number + 1):
            logits = level_prior(codes, condition).flatten(2)
            certain = codes.flatten(1)[:, : passes - 1]  # by induction: each was selected from logits of certain codes
            others = [select(logits[:, :, position], position) for position in range(passes - 1, number)]
            found = torch.cat([certain, torch.stack(others, dim=1)], dim=1).view_as(codes)
            if torch.equal(found, codes):
                return codes, passes
            codes = found
    return codes, number
