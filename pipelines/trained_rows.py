"""Which rows of a store a prior was trained on: by their keys, from what its run.json says of the store and the share that was held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpus.holdout import Hashes, holdout_threshold, key_hashes, threshold
from pipelines.outputs import RUN_FILE
from vqmill import Codes, open_codes
from vqmill.errors import CodesError

HELD_OUT, TRAINED, UNKNOWN = 0, 1, -1


@dataclass(frozen=True)
class Training:
    """What a prior was trained on.

    Attributes:
        store: its path.
        plan: which samples were encoded into its last segment, as it was then.
        rows: how many rows it had.
        fraction: of the samples, which was held out.
    """

    store: Path
    plan: str
    rows: int
    fraction: float


def read_training(prior_path: Path, fingerprint: str) -> Training | None:
    """What lies beside a prior about its training; None when that is of another prior, or not what train-prior writes."""
    folder = prior_path if prior_path.is_dir() else prior_path.parent
    try:
        record = json.loads((folder / RUN_FILE).read_bytes())
        if record["fingerprint"] != fingerprint:
            return None
        settings = record["settings"]
        store, fraction = Path(record["folder"]) / record["store"], float(settings["holdout"])
        found = Training(store, str(settings["store"]["plan"]), int(settings["rows"]), fraction)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return found if 0 < fraction < 1 and found.rows > 0 else None


def trained_on(training: Training | None, codes: Codes, rows: range) -> tuple[np.ndarray[Any, Any], str]:
    """Which rows of a store a prior has seen in training, as far as that can be known.

    Samples are known by their keys, so a slice, a merge or another encoding of the store that the prior was trained on counts as that
    store. When it is no longer there, what the keys' hashes hold out was not trained on, and of the rest nothing is known.

    Args:
        training: of the prior; None when nothing is known of it.
        codes: the store.
        rows: those that are asked about.

    Returns:
        int64 [n]: TRAINED, HELD_OUT (also of rows that were not in the store at all) or UNKNOWN; and why rows are UNKNOWN, or nothing.
    """
    if training is None:
        note = f"which rows it was trained on is not known: nothing beside the prior says ({RUN_FILE} of train-prior)"
        return np.full(len(rows), UNKNOWN), note
    own = key_hashes(codes.sample_keys()[rows.start : rows.stop])
    seen = _keys_of_training(training, codes)
    if seen is None:
        known = np.where(own < np.uint64(threshold(training.fraction)), HELD_OUT, UNKNOWN)
        number = int((known == UNKNOWN).sum())
        gone = f"{training.store}, which it was trained on, is gone or another store now"
        return known, f"whether it was trained on {number:,} of these {len(rows):,} rows is not known: {gone}"
    kept = seen[seen >= holdout_threshold(seen, training.fraction)]
    return np.where(np.isin(own, kept), TRAINED, HELD_OUT), ""


def _keys_of_training(training: Training, codes: Codes) -> Hashes | None:
    """The hashes of the keys of all rows that there were; None when the store is not to be found."""
    for open_store in (lambda: codes, lambda: open_codes(training.store)):
        try:
            store = open_store()
            if training.plan in [segment.plan for segment in store.spec.segments] and len(store) >= training.rows:
                return key_hashes(store.sample_keys()[: training.rows])
        except (CodesError, OSError, ValueError):  # the path is only what a file says
            continue
    return None
