"""What a prior reads of a store: its levels, classes and rows, and whether they are those that it models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpus.holdout import holdout_threshold, key_hashes
from priors import LevelShape, Prior, PriorConfig
from vqmill import Codes
from vqmill.errors import CodesError, UsageError
from vqmill.spec import MISSING_LABEL

BASELINE_CODES = 4_000_000  # that baselines are counted on; more would not move the figures, and take gigabytes


def level_shapes(codes: Codes) -> list[LevelShape]:
    """The store's levels as the prior wants them.

    Raises:
        UsageError: a level is not a two-dimensional grid.
    """
    for level in codes.spec.levels:
        if len(level.grid) != 2:
            cause = ""
            if "depth" in level.axes:
                cause = f"Its codes have {level.grid[0]} residual stages: tokenize with a tokenizer without them (num_quantizers = 1 in [tokenizer]). "
            raise UsageError(
                f"{codes.place.name}: level '{level.name}' has the axes {', '.join(level.axes)} (a row is {'x'.join(map(str, level.grid))}), but a "
                f"prior models one code at each place, row, y, x. {cause}For a model of your own, read the codes with vqmill.open_codes."
            )
    return [LevelShape(level.name, level.codebook_size, (level.grid[0], level.grid[1])) for level in codes.spec.levels]


def num_classes(codes: Codes) -> int:
    """How many labels there are: the named classes, else one more than the largest label; 0 without labels."""
    largest = int(codes.labels.max(initial=-1))
    return 0 if largest < 0 else max(len(codes.class_names), largest + 1)


def split_rows(codes: Codes, fraction: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows to train on and rows held out, by the hash of each sample's key; as for tokenizers, one at least is held out.

    Raises:
        UsageError: nothing is left to train on.
    """
    hashes = key_hashes(codes.sample_keys())
    if len(np.unique(hashes)) < 2:
        raise UsageError(
            f"{codes.place.name}: {len(codes)} rows; it takes two samples, one to train on and one to hold out. Tokenize a larger corpus."
        )
    held = hashes < holdout_threshold(hashes, fraction)
    if held.all():
        raise UsageError(
            f"{codes.place.name}: --holdout {fraction} keeps all {len(codes):,} rows out of training. Choose a smaller fraction."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def evenly(rows: np.ndarray[Any, Any], limit: int) -> np.ndarray[Any, Any]:
    """At most so many of the rows, from everywhere among them: a corpus may be sorted by class."""
    return rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


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
        raise UsageError(f"{place} with {codes.place.name}: {error}") from error
    if missing := [name for name in config.level_names if name not in found]:
        raise UsageError(
            f"{codes.place.name}: has no level {', '.join(missing)}; its levels are {', '.join(found)}, but {place} models "
            f"{', '.join(config.level_names)}. Take a store with all of them, or train a prior on this one."
        )
    for shape in config.levels:
        if found[shape.name] != shape:
            raise UsageError(
                f"{codes.place.name}: level '{shape.name}' has {_words(found[shape.name])}, but {place} models {_words(shape)}. Tokenize at "
                "the size that the prior's store was made at, or train a prior on this store."
            )


def check_labels(prior: Prior, place: Path, codes: Codes, rows: range, labels: np.ndarray[Any, Any]) -> list[str]:
    """Refuses labels that a prior does not know.

    Args:
        prior: knows classes, or none.
        place: of the prior, for errors.
        codes: the store.
        rows: those that are looked at.
        labels: theirs, int64 [n], -1 for rows without one. A prior without classes takes any.

    Returns:
        Warnings: of rows without a label that are to be read by a prior that has never seen one, and of labels that name one class in the
        store and another in the prior.

    Raises:
        UsageError: a label outside of the prior's classes; the first such row is named.
    """
    config = prior.config
    if not config.num_classes:
        return []
    unknown = np.flatnonzero((labels < MISSING_LABEL) | (labels >= config.num_classes))
    if len(unknown):
        raise UsageError(
            f"{codes.place.name}: row {rows[unknown[0]]} has label {labels[unknown[0]]}, but {place} knows the classes "
            f"0..{config.num_classes - 1}; so it is with {len(unknown):,} of {len(labels):,} rows. Choose rows of these classes "
            "(--rows, vqmill slice --label), or train a prior on this store."
        )
    warnings = []
    pairs = enumerate(zip(codes.class_names, prior.class_names, strict=False))
    if others := [(label, *names) for label, names in pairs if all(names) and len(set(names)) > 1]:
        label, there, here = others[0]
        warnings.append(
            f"warning: label {label} is {there!r} in {codes.path} and {here!r} to {place}; so it is with {len(others):,} of "
            f"{config.num_classes:,} classes. Labels are read by their numbers."
        )
    number = int((labels == MISSING_LABEL).sum())
    if number and any(network.label_dropout == 0 for network in config.networks):
        warnings.append(
            f"warning: {number:,} of {len(labels):,} rows have no label and are read as of any class, which {place} never was shown in "
            "training (label_dropout 0): do not compare their bits with those of other rows."
        )
    return warnings


def _words(shape: LevelShape) -> str:
    return f"{shape.grid[0]}x{shape.grid[1]} codes of {shape.codebook_size}"
