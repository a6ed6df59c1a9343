"""The command `train-prior` refuses codes that no prior models, before it reads any."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import app
from vqmill.spec import LevelSpec


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (
            "depth",
            "level 'bottom' has the axes row, depth, y, x (a row is 3x4x2), but a prior models one code at each place, row, y, x. "
            "Its codes have 3 residual stages: tokenize with a tokenizer without them (num_quantizers = 1 in [tokenizer]). ",
        ),
        (
            "time",
            "level 'bottom' has the axes row, time, y, x (a row is 3x4x2), but a prior models one code at each place, row, y, x. For",
        ),
    ],
    ids=["residual", "clips"],
)
def test_grids_of_other_axes_are_refused_first(
    outer: str, message: str, stores: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = (LevelSpec("top", 16, (2, 2)), LevelSpec("bottom", 16, (3, 4, 2), outer))
    spec = replace(stores.two_levels, levels=levels)
    store, out = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 8)), tmp_path / "prior"
    shutil.rmtree(store / "samples")  # would be missed if it were read
    assert app(["train-prior", str(store), "--out", str(out), "--preset", "pixelcnn-tiny"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("prior*"))
