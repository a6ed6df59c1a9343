"""Which rows a prior was trained on: known by keys, from what training wrote, and no guess where it cannot be known."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import priors
from pipelines.cli import app
from pipelines.prior_inputs import split_rows
from pipelines.trained_rows import HELD_OUT, TRAINED, UNKNOWN, read_training, trained_on
from vqmill import open_codes
from vqmill.spec import Segment, StoreSpec

HOLDOUT = 0.3


def run(*words: str | Path) -> int:
    return app([str(word) for word in words])


@pytest.fixture
def spec_of(stores: Any) -> Callable[..., StoreSpec]:
    """A store's specification for a corpus of these plans, one segment of 40 samples each."""

    def make(*plans: str) -> StoreSpec:
        parts = (Segment(plan, 40 * number, 5 * number, 5, 40) for number, plan in enumerate(plans))
        return replace(stores.two_levels, segments=tuple(parts))

    return make


@pytest.fixture
def store(make_store: Any, spec_of: Any, tmp_path: Path, no_fsync: None) -> Path:
    return make_store(tmp_path / "codes.zarr", 40, spec=spec_of("plan"))


@pytest.fixture
def prior(store: Path, tmp_path: Path) -> Path:
    """Trained for a step on `store`, whose rows have one key each."""
    flags = ("--preset", "pixelcnn-tiny", "--steps", "1", "--holdout", str(HOLDOUT))
    assert run("train-prior", store, "--out", tmp_path / "prior", *flags) == 0
    return tmp_path / "prior"


def states(prior: Path, store: Path, rows: range | None = None) -> tuple[list[int], str]:
    codes = open_codes(store)
    training = read_training(prior, priors.load(prior).fingerprint)
    found, note = trained_on(training, codes, range(len(codes)) if rows is None else rows)
    return found.tolist(), note


def expected(store: Path) -> np.ndarray[Any, Any]:
    found = np.full(40, HELD_OUT)
    found[split_rows(open_codes(store), HOLDOUT)[0]] = TRAINED
    assert 0 < found.sum() < 40
    return found


def test_rows_of_the_store_that_was_trained_on(store: Path, prior: Path, tmp_path: Path) -> None:
    assert states(prior, store) == (expected(store).tolist(), "")
    assert states(prior, store, range(7, 19)) == (expected(store)[7:19].tolist(), "")
    assert states(prior / "prior.safetensors", store) == (expected(store).tolist(), "")
    moved = tmp_path / "moved.zarr"
    store.rename(moved)
    assert states(prior, moved) == (expected(moved).tolist(), ""), "the same store elsewhere"


def test_rows_that_were_appended_later_were_not_trained_on(
    store: Path, prior: Path, make_store: Any, spec_of: Any
) -> None:
    wanted = [*expected(store).tolist(), *[HELD_OUT] * 40]
    shutil.rmtree(store)
    make_store(store, 80, spec=spec_of("plan", "longer plan"))
    assert states(prior, store) == (wanted, "")


def test_rows_of_other_stores_are_known_by_their_keys(
    store: Path, prior: Path, make_store: Any, spec_of: Any, tmp_path: Path
) -> None:
    assert run("slice", store, "--rows", "5:25", "--out", tmp_path / "part.zarr") == 0
    assert states(prior, tmp_path / "part.zarr") == (expected(store)[5:25].tolist(), "")
    other = make_store(tmp_path / "other.zarr", 40, spec=spec_of("other"), prefix="elsewhere")
    assert states(prior, other) == ([HELD_OUT] * 40, "")


def test_when_the_store_is_gone_only_what_the_share_holds_out_is_known(
    store: Path, prior: Path, make_store: Any, spec_of: Any, tmp_path: Path
) -> None:
    assert run("slice", store, "--rows", "0:25", "--out", tmp_path / "part.zarr") == 0
    wanted = np.where(expected(store)[:25] == HELD_OUT, HELD_OUT, UNKNOWN)
    shutil.rmtree(store)
    found, note = states(prior, tmp_path / "part.zarr")
    assert found == wanted.tolist()
    assert f"on {(wanted == UNKNOWN).sum()} of these 25 rows is not known: {store}" in note
    make_store(store, 40, spec=spec_of("another"))
    assert states(prior, tmp_path / "part.zarr") == (found, note), "another store in its place"


@pytest.mark.parametrize(
    "change",
    [
        lambda record: None,
        lambda record: {},
        lambda record: record | {"fingerprint": "0" * 32},
        lambda record: record | {"settings": record["settings"] | {"holdout": "much"}},
        lambda record: record | {"settings": record["settings"] | {"holdout": 7}},
        lambda record: record | {"settings": None},
        lambda record: record | {"settings": record["settings"] | {"rows": math.inf}},
        lambda record: [record],
    ],
    ids=["missing", "empty", "of_another_prior", "text", "no_share", "no_settings", "no_number", "list"],
)
def test_without_a_record_of_this_prior_nothing_is_known(store: Path, prior: Path, change: Any) -> None:
    file = prior / "run.json"
    if (changed := change(json.loads(file.read_bytes()))) is None:
        file.unlink()
    else:
        file.write_text(json.dumps(changed))
    found, note = states(prior, store)
    assert found == [UNKNOWN] * 40
    assert "is not known: nothing beside the prior says" in note


def test_a_record_that_names_no_possible_place_does_no_harm(store: Path, prior: Path) -> None:
    file = prior / "run.json"
    record = json.loads(file.read_bytes())
    file.write_text(json.dumps(record | {"store": "a\0b", "settings": record["settings"] | {"rows": 41}}))
    found, note = states(prior, store)
    assert set(found) == {HELD_OUT, UNKNOWN}
    assert "is gone or another store now" in note
