"""Drawing samples from a whole prior: the coarsest level given the label, then each finer level given those above it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priors.config import LevelShape
from priors.hierarchy import Prior
from priors.level import inference
from priors.likelihood import score
from priors.running import Sampler, Select, run
from priors.selecting import Drawing, clamped, guided, gumbel_select
from vqmill.errors import CodesError

Codes = dict[str, Tensor]
Labels = Tensor | np.ndarray[Any, Any] | Sequence[int] | int


def sample(
    prior: Prior,
    num: int,
    labels: Labels | None = None,
    seed: int = 0,
    drawing: Drawing | None = None,
    given: Mapping[str, Tensor] | None = None,
    batch_size: int = 64,
    sampler: Sampler = "cached",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Codes:
    """Draws samples.

    A sample is a function of the weights, its label, the seed, the drawing, what is given of it, and its number: not of `num` or
    `batch_size` (as far as the device rounds alike for all batch sizes).

    Args:
        prior: any mode; its mode is kept.
        num: how many samples.
        labels: whole numbers [num] in [-1, num_classes), -1 for any class: a tensor, an array or a list; or one number for all samples;
            None for any class.
        seed: in [0, 2**63).
        drawing: how codes are drawn; None for the model's own probabilities.
        given: codes that are known already, by level, integers [num, h, w], -1 where they are to be drawn; a level that is not named is
            drawn whole. What is known of later positions has no influence on earlier ones.
        batch_size: how many samples are drawn at once.
        sampler: as for `run`.
        device: where to compute; the prior is moved there. None: where the prior is.
        progress: called with (codes drawn, codes in all) after each position of each batch.

    Returns:
        Codes by level name, int64 [num, h, w], on the CPU.

    Raises:
        CodesError: an argument is out of its range, labels are given to a prior that takes none, or what the drawing needs was not trained.
    """
    drawing = drawing or Drawing()
    check_sampling(prior, num, labels, seed, drawing, given, batch_size)
    classes = _as_labels(prior, num, labels)
    known = {name: _as_given(prior.level_prior(name).shape, num, values) for name, values in (given or {}).items()}
    if device is not None:
        prior.to(device)
    total = num * drawing.candidates * sum(level.num_codes for level in prior.config.levels)
    drawn = 0

    def tell(number: int) -> None:
        nonlocal drawn
        drawn += number
        if progress is not None:
            progress(drawn, total)

    batches = []
    for start in range(0, num, batch_size):
        samples = range(start, min(start + batch_size, num))
        part = slice(start, samples.stop)
        batch = _Batch(
            prior, samples, None if classes is None else classes[part], seed, drawing,
            {name: values[part] for name, values in known.items()}, sampler, tell,
        )  # fmt: skip
        batches.append({name: values.cpu() for name, values in batch.best().items()})
    return {name: torch.cat([batch[name] for batch in batches]) for name in prior.levels}


class _Batch:
    """Some samples that are drawn at once."""

    def __init__(
        self, prior: Prior, samples: range, labels: Tensor | None, seed: int, drawing: Drawing, given: Mapping[str, Tensor],
        sampler: Sampler, tell: Callable[[int], None],
    ) -> None:  # fmt: skip
        device = prior.level_prior(prior.levels[0]).device
        self._prior, self._samples, self._seed, self._drawing = prior, samples, seed, drawing
        self._labels = None if labels is None else labels.to(device)
        self._given = {name: values.to(device) for name, values in given.items()}
        self._sampler: Sampler = sampler
        self._tell = tell

    def best(self) -> Codes:
        """The candidate of each sample that its label explains best."""
        best = self._draw(0)
        if self._drawing.candidates == 1:
            return best
        evidence = self._evidence(best)
        for candidate in range(1, self._drawing.candidates):
            other = self._draw(candidate)
            found = self._evidence(other)
            better = (found > evidence)[:, None, None]
            best = {name: torch.where(better, other[name], codes) for name, codes in best.items()}
            evidence = torch.maximum(evidence, found)
        return best

    def _draw(self, candidate: int) -> Codes:
        codes: Codes = {}
        for name in self._prior.levels:
            level_prior = self._prior.level_prior(name)
            select = gumbel_select(level_prior, self._samples, self._seed, self._drawing, candidate)
            if name in self._given:
                select = clamped(select, self._given[name])
            select = self._counted(select)
            number = len(self._samples)
            with inference(level_prior):
                condition = level_prior.condition(self._labels, codes)
                if self._drawing.guidance != 1:
                    assert self._labels is not None  # checked before
                    free = level_prior.condition(torch.full_like(self._labels, -1), codes)
                    condition = torch.cat([part for part in (condition, free) if part is not None])
                    select, number = guided(select, self._drawing.guidance), 2 * number
            codes[name] = run(level_prior, number, select, condition, self._sampler)[: len(self._samples)]
        return codes

    def _evidence(self, codes: Codes) -> Tensor:
        """log2 p(x | label) - log2 p(x) of each sample, float64 [N]."""
        assert self._labels is not None  # checked before
        labelled = score(self._prior, {**codes, "label": self._labels})
        free = score(self._prior, {**codes, "label": torch.full_like(self._labels, -1)})
        return torch.stack([free[name] - labelled[name] for name in labelled]).sum(0)

    def _counted(self, select: Select) -> Select:
        def select_and_tell(logits: Tensor, position: int) -> Tensor:
            self._tell(len(logits))
            return select(logits, position)

        return select_and_tell


def check_sampling(
    prior: Prior, num: int, labels: Labels | None, seed: int, drawing: Drawing, given: Mapping[str, Tensor] | None = None,
    batch_size: int = 64,
) -> None:  # fmt: skip
    """Refuses what `sample` cannot do, before anything is computed; arguments as there.

    Raises:
        CodesError: as `sample`.
    """
    for name, value in (("num", num), ("batch_size", batch_size)):
        if value < 1:
            raise CodesError(f"{name}: expected at least 1, found {value}.")
    if not 0 <= seed < 2**63:
        raise CodesError(f"seed: expected a whole number in [0, 2**63), found {seed}.")
    found = _as_labels(prior, num, labels)
    if drawing.compares:
        _check_comparison(prior, found, drawing)
    for name, values in (given or {}).items():
        _as_given(prior.level_prior(name).shape, num, values)


def _as_labels(prior: Prior, num: int, labels: Labels | None) -> Tensor | None:
    """The labels to condition on, checked: int64 [num], or None for a prior that takes none."""
    num_classes = prior.config.num_classes
    if labels is None:
        return torch.full((num,), -1) if num_classes else None
    if not num_classes:
        raise CodesError(
            "labels were given, but this prior was trained without them. Sample without a label, or train one with."
        )
    found = _integers("labels", labels, f"one class number for all, or {num} whole numbers")
    if found.shape not in ((), (num,)):
        raise CodesError(
            f"labels: expected one class number for all, or {num} whole numbers, found {list(found.shape)}."
        )
    _check_range("labels", found, num_classes, "for any class")
    return found.expand(num)


def _as_given(shape: LevelShape, num: int, values: Tensor) -> Tensor:
    """What is given of a level, checked: int64 [num, h, w]."""
    what, wanted = f"given codes of level '{shape.name}'", [num, *shape.grid]
    found = _integers(what, values, f"whole numbers {wanted}")
    if list(found.shape) != wanted:
        raise CodesError(f"{what}: expected whole numbers {wanted}, found {list(found.shape)}.")
    _check_range(what, found, shape.codebook_size, "to be drawn")
    return found


def _integers(what: str, values: Labels, expected: str) -> Tensor:
    """Whole numbers of any shape as an int64 tensor, which is a copy unless they are one."""
    if isinstance(values, Tensor):
        found, whole = values, not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    else:
        try:
            array = np.array(values)
        except (TypeError, ValueError) as error:  # lists of different lengths, for example
            raise CodesError(f"{what}: expected {expected}, found {values!r}.") from error
        found, whole = array, array.dtype.kind in "iu"
    if not whole:
        raise CodesError(f"{what}: expected {expected}, found {found.dtype} {list(found.shape)}.")
    return torch.as_tensor(found).long()


def _check_range(what: str, values: Tensor, size: int, free: str) -> None:
    wrong = values[(values < -1) | (values >= size)]
    if len(wrong):
        raise CodesError(f"{what}: expected 0..{size - 1} (or -1 {free}), found {int(wrong[0])}.")


def _check_comparison(prior: Prior, labels: Tensor | None, drawing: Drawing) -> None:
    """Guidance and candidates compare the model with a label to the model without, so both must have been learned and a label be given."""
    asked = " and ".join(name for name in ("guidance", "candidates") if getattr(drawing, name) != 1)
    if labels is None:
        raise CodesError(
            f"{asked}: would compare a class to any class, but this prior was trained without classes. Leave it out."
        )
    if bool((labels < 0).any()):
        raise CodesError(
            f"{asked}: would compare a class to any class, so every sample needs a class, not -1: give labels."
        )
    if not all(network.label_dropout for network in prior.config.networks):
        raise CodesError(
            f"{asked}: would compare a class to any class, which only a prior knows that was trained with label_dropout above 0."
        )
