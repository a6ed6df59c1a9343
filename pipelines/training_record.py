"""What train-tokenizer wrote down beside a tokenizer: the corpus it saw, what it held out, and how images were brought to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.options import ImageFlags
from vqmill.errors import UsageError
from vqmill.files import SETTINGS_FILE


@dataclass(frozen=True)
class TrainingRecord:
    """Of a tokenizer's training.

    Attributes:
        plan: the digest of the corpus's plan.
        holdout: the share of the samples that was held out, in (0, 1).
        preprocessing: as `Preprocessing.to_dict` gives it; empty where it is not told.
    """

    plan: str
    holdout: float
    preprocessing: Mapping[str, Any]


def training_record(tokenizer_path: Path) -> TrainingRecord | None:
    """The record of a training, None where none lies beside the tokenizer.

    Args:
        tokenizer_path: the tokenizer's folder, or its file.

    Raises:
        UsageError: it cannot be read.
    """
    path = (tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent) / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        if (
            found.get("command", "train-tokenizer") != "train-tokenizer"
        ):  # an imported tokenizer: nobody knows what it was trained on
            return None
        record = TrainingRecord(str(found["plan"]), float(found["holdout"]), dict(found.get("preprocessing", {})))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: expected the settings of train-tokenizer, found something else ({error!r}). Restore it from a copy; without the "
            "file, all images are looked at."
        ) from error
    if not 0 < record.holdout < 1:
        raise UsageError(
            f"{path}: expected a hold-out between 0 and 1, found {record.holdout}. Restore it from a copy."
        )
    return record


def trained_images(tokenizer_path: Path | None, flags: ImageFlags) -> ImageFlags:
    """The flags, with what was not given as the tokenizer was trained, where that is known."""
    record = training_record(tokenizer_path) if tokenizer_path else None
    return flags.or_recorded(record.preprocessing) if record else flags
