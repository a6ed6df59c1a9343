"""The command `sample` with classes that have names: which are drawn, how many, and what the picture says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import priors
import tokenizer
from pipelines.cli import app
from pipelines.pictures import GAP, LINE, MARGIN, PAPER, TITLE
from pipelines.sample import each_layout
from tokenizer.protocol import level_specs
from vqmill import open_codes

SIDE = 64 + GAP  # of a tile: images of 16 pixels, enlarged


def run(*words: object) -> int:
    return app([str(word) for word in words])


@pytest.fixture
def prior_of(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes an untrained prior for the tokenizer, with so many classes of these names."""

    def make(num_classes: int, names: tuple[str, ...] = ()) -> Path:
        model = tokenizer.load(tokenizer_folder)
        levels = [
            priors.LevelShape(level.name, level.codebook_size, (level.grid[0], level.grid[1]))
            for level in level_specs(model, 16)
        ]
        torch.manual_seed(0)
        config = priors.preset_config("pixelcnn-tiny", levels, num_classes, model.fingerprint, depth=8, num_layers=1)
        priors.save(priors.Prior(config, names).eval(), tmp_path / f"prior{num_classes}")
        return tmp_path / f"prior{num_classes}"

    return make


def labels_of(path: Path) -> list[int]:
    return open_codes(path).labels.tolist()


def test_a_name_is_as_good_as_a_number(
    prior_of: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sample", prior_of(3, ("cat", "dog")), "--tokenizer", tokenizer_folder, "--num", 2)
    for word in ("DOG", "1"):
        out = (f"--out={tmp_path / 's.png'}", f"--codes={tmp_path / 's.zarr'}")
        assert run(*command, "--label", word, *out, "--json") == 0, "the same command in other words"
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("s.png: 2 images, seed 0, label 1 (dog)")
        assert json.loads(lines[-1])["label"] == "1"
    assert labels_of(tmp_path / "s.zarr") == [1, 1]
    assert open_codes(tmp_path / "s.zarr").class_names == ("cat", "dog")
    assert run(*command, "--label", "dgo", "--out", tmp_path / "x.png") == 2
    assert "Did you mean 'dog'?" in capsys.readouterr().err
    assert run(*command, "--out", tmp_path / "any.png") == 0
    assert "2 images, seed 0, any label" in capsys.readouterr().out


@pytest.mark.parametrize("num_classes", range(1, 400, 7))
def test_without_a_number_every_class_is_drawn_equally_often_in_full_rows(num_classes: int) -> None:
    num, columns = each_layout(num_classes, None)
    assert num % columns == 0
    if num_classes > 256:
        assert (num, columns) == (256, 16)
        return
    assert num % num_classes == 0
    assert max(num_classes, 43) <= num <= max(num_classes, 96)
    assert num_classes > 32 or columns % num_classes == 0


def test_a_number_that_was_asked_for_is_kept() -> None:
    assert each_layout(10, 7) == (7, 10)
    assert each_layout(4, 64) == (64, 8)
    assert each_layout(1000, 50) == (50, 7)


def words_above(picture: Image.Image, column: int) -> bool:
    left, top = MARGIN + column * SIDE, MARGIN + TITLE
    return bool((np.asarray(picture)[top - 2 : top - 2 + LINE, left : left + SIDE - GAP] != PAPER).any())


def test_classes_have_columns_with_headings(
    prior_of: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sample", prior_of(9, ("cat",)), "--tokenizer", tokenizer_folder, "--label", "each")
    assert run(*command, "--out", tmp_path / "each.png", "--codes", tmp_path / "each.zarr") == 0
    assert "63 images, seed 0, each of 9 classes in turn" in capsys.readouterr().out
    assert labels_of(tmp_path / "each.zarr") == list(range(9)) * 7
    with Image.open(tmp_path / "each.png") as picture:
        assert picture.size == (9 * SIDE - GAP + 2 * MARGIN, TITLE + LINE + 7 * SIDE - GAP + 2 * MARGIN)
        assert all(words_above(picture, column) for column in range(9))
    assert run(*command, "--num", 6, "--columns", 4, "--out", tmp_path / "four.png") == 0
    with Image.open(tmp_path / "four.png") as picture:  # no class has a column: captions
        assert picture.height == TITLE + 2 * (SIDE + LINE) - GAP + 2 * MARGIN


def test_of_very_many_classes_the_first_are_drawn_and_that_is_said(
    prior_of: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sample", prior_of(300), "--tokenizer", tokenizer_folder, "--label", "each")
    assert run(*command, "--out", tmp_path / "s.png", "--codes", tmp_path / "s.zarr") == 0
    assert "each: the first 256 of 300 classes; --num 300 draws all of them" in capsys.readouterr().out
    assert labels_of(tmp_path / "s.zarr") == list(range(256))


def test_completed_rows_have_captions(
    prior_of: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior, drawn = prior_of(2, ("cat", "dog")), tmp_path / "s.zarr"
    command = ("sample", prior, "--tokenizer", tokenizer_folder)
    assert run(*command, "--num", 5, "--label", "cat", "--codes", drawn, "--out", tmp_path / "s.png") == 0
    assert run(*command, "--complete", drawn, "--out", tmp_path / "c.png") == 0, "all five: there are no 16"
    assert "5 images, seed 0, the rows' own labels" in capsys.readouterr().out
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.height == TITLE + 3 * (SIDE + 2 * LINE) - GAP + 2 * MARGIN
        below = np.asarray(picture)[MARGIN + TITLE + 64 :][: 2 * LINE, MARGIN : MARGIN + 64]
        assert (below != PAPER).any(axis=(1, 2))[:LINE].any()
        assert (below != PAPER).any(axis=(1, 2))[LINE:].any()
    assert run(*command, "--complete", drawn, "--label", "dog", "--out", tmp_path / "d.png") == 0
    assert "label 1 (dog)" in capsys.readouterr().out
