"""Whether a prior can read the rows of a store: said before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.train_prior import level_shapes
from priors import LevelShape, PriorConfig
from vqmill import Codes
from vqmill.errors import CodesError, UsageError
from vqmill.spec import MISSING_LABEL


def check_store(config: PriorConfig, place: Path, codes: Codes) -> None:
    """Refuses a store whose codes are not those that a prior models. Levels that the prior does not model are left alone.

    Args:
        config: the prior's.
        place: of the prior, for errors.
        codes: the store.

    Raises:
        UsageError: another tokenizer's codes, residual codes or clips, a level that is missing, another grid or codebook size.
    """
    found = {shape.name: shape for shape in level_shapes(codes)}
    try:
        config.check_tokenizer(codes.spec.tokenizer["fingerprint"])
    except CodesError as error:
        raise UsageError(f"{place} with {codes.path}: {error}") from error
    if missing := [name for name in config.level_names if name not in found]:
        raise UsageError(
            f"{codes.path}: has no level {', '.join(missing)}; its levels are {', '.join(found)}, but {place} models "
            f"{', '.join(config.level_names)}. Take a store with all of them, or train a prior on this one."
        )
    for shape in config.levels:
        if found[shape.name] != shape:
            raise UsageError(
                f"{codes.path}: level '{shape.name}' has {_words(found[shape.name])}, but {place} models {_words(shape)}. Tokenize at "
                "the size that the prior's store was made at, or train a prior on this store."
            )


def check_labels(config: PriorConfig, place: Path, codes: Codes, rows: range, labels: np.ndarray[Any, Any]) -> str:
    """Refuses labels that a prior does not know.

    Args:
        config: the prior's.
        place: of the prior, for errors.
        codes: the store.
        rows: those that are looked at.
        labels: theirs, int64 [n], -1 for rows without one. A prior without classes takes any.

    Returns:
        A warning when rows without a label are to be read by a prior that has never seen one; else nothing.

    Raises:
        UsageError: a label outside of the prior's classes; the first such row is named.
    """
    if not config.num_classes:
        return ""
    unknown = np.flatnonzero((labels < MISSING_LABEL) | (labels >= config.num_classes))
    if len(unknown):
        raise UsageError(
            f"{codes.path}: row {rows[unknown[0]]} has label {labels[unknown[0]]}, but {place} knows the classes "
            f"0..{config.num_classes - 1}; so it is with {len(unknown):,} of {len(labels):,} rows. Choose rows of these classes "
            "(--rows, vqmill slice --label), or train a prior on this store."
        )
    number = int((labels == MISSING_LABEL).sum())
    if number and any(network.label_dropout == 0 for network in config.networks):
        return (
            f"warning: {number:,} of {len(labels):,} rows have no label and are read as of any class, which {place} never was shown in "
            "training (label_dropout 0): do not compare their bits with those of other rows."
        )
    return ""


def _words(shape: LevelShape) -> str:
    return f"{shape.grid[0]}x{shape.grid[1]} codes of {shape.codebook_size}"
