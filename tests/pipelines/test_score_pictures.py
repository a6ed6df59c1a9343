"""The picture of `score`: the least and the most likely rows, as images or codes, and where their bits are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import priors
import tokenizer
from pipelines.cli import app
from pipelines.pictures import GAP, LINE, MARGIN, TITLE, Panel, code_colours, side_by_side
from pipelines.surprise import bits_bar, heat
from tokenizer.protocol import level_specs
from vqmill import open_codes

FINGERPRINT = "0" * 32  # of the stores that `make_store` makes
TWO_LEVELS = (priors.LevelShape("top", 512, (2, 3)), priors.LevelShape("bottom", 200, (4, 6)))
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def toy(num_classes: int = 3, levels: Any = TWO_LEVELS, fingerprint: str = FINGERPRINT, **sizes: Any) -> priors.Prior:
    torch.manual_seed(0)
    sizes = {"depth": 8, "num_layers": 1} | sizes
    return priors.from_preset("pixelcnn-tiny", levels, num_classes, fingerprint, **sizes).eval()


@pytest.fixture
def store(make_store: Any, tmp_path: Path, no_fsync: None) -> Path:
    """21 rows in Zarr shards of 8, labels 0, 1, 2, none, 0, ..."""
    return make_store(tmp_path / "codes.zarr", 21)


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    priors.save(toy(), tmp_path / "prior")
    return tmp_path / "prior"


def tile(picture: Image.Image, left: int, index: int, columns: int, side: int, top: int = 0) -> np.ndarray[Any, Any]:
    """Pixels [side, side, 3] of one tile of the panel that begins at `left`, in the sheet that begins at `top`."""
    x, y = left + index % columns * (side + GAP), top + MARGIN + TITLE + index // columns * (side + 2 * LINE + GAP)
    return np.asarray(picture)[y : y + side, x : x + side]


def test_without_a_tokenizer_the_picture_shows_codes_and_where_their_bits_are(
    store: Path, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, columns, side = tmp_path / "scores", 4, 66
    assert run("score", prior, store, "--out", out, "--num", "5") == 0
    assert "the picture shows codes as colours, not images:" in capsys.readouterr().out
    picture = Image.open(out / "least_and_most_likely.png")
    wide, tall = columns * (side + GAP) - GAP, TITLE + 2 * MARGIN + 2 * (side + 2 * LINE + GAP) - GAP
    bar = bits_bar()
    assert picture.size == (4 * (wide + MARGIN) + MARGIN, 2 * tall + bar.height)
    foot = picture.crop((0, 2 * tall, bar.width, picture.height))
    np.testing.assert_array_equal(np.asarray(foot), np.asarray(bar))
    assert len(np.unique(np.asarray(bar)[0, MARGIN:-MARGIN], axis=0)) > 200, "of many colours"
    record, codes = json.loads((out / "score.json").read_bytes()), open_codes(store)
    maps = zarr.open_group(out / "maps.zarr", mode="r")
    for sheet, end in ((0, "least_likely"), (1, "most_likely")):
        for index, entry in enumerate(record[end]):
            for panel, name in enumerate(("top", "bottom")):
                painted = code_colours(codes[name][[entry["row"]]], side)[0].transpose(1, 2, 0)
                warm = heat(np.asarray(maps[name][entry["row"]])[None], side)[0].transpose(1, 2, 0)
                for place, wanted in ((panel, painted), (2 + panel, warm)):
                    left = MARGIN + place * (wide + MARGIN)
                    np.testing.assert_array_equal(tile(picture, left, index, columns, side, sheet * tall), wanted)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "flag"])
def test_with_a_tokenizer_the_picture_shows_images(
    stores: Any,
    tokenizer_folder: Path,
    tmp_path: Path,
    recorded: bool,
    no_fsync: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tokenizer.load(tokenizer_folder)
    spec = replace(
        stores.two_levels, levels=tuple(level_specs(model, 16)),
        tokenizer={"fingerprint": model.fingerprint, "preset": model.name, "precision": "float32"},
    )  # fmt: skip
    store, out = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 3)), tmp_path / "scores"
    shapes = [
        priors.LevelShape(level.name, level.codebook_size, (level.grid[0], level.grid[1])) for level in spec.levels
    ]
    priors.save(toy(0, shapes, model.fingerprint), tmp_path / "prior")
    (tmp_path / "codes.zarr.run.json").write_text(json.dumps({"tokenizer": str(tokenizer_folder)} if recorded else {}))
    words = () if recorded else ("--tokenizer", tokenizer_folder)
    assert run("score", tmp_path / "prior", store, "--out", out, "--num", "1", *words) == 0
    assert "the picture shows codes" not in capsys.readouterr().out
    record = json.loads((out / "score.json").read_bytes())
    picture = Image.open(out / "least_and_most_likely.png")
    row, codes = record["least_likely"][0]["row"], open_codes(store)
    image = model.decode({name: torch.from_numpy(codes[name][[row]].astype(np.int64)) for name in codes.levels})[0]
    enlarged = image.numpy().transpose(1, 2, 0).repeat(4, 0).repeat(4, 1)  # 16 pixels a side to 64
    np.testing.assert_array_equal(tile(picture, MARGIN, 0, 1, 64), enlarged)


def test_heat_has_a_fixed_scale() -> None:
    colours = heat(np.array([[[0.0, 16 / 3], [32 / 3, 16.0]], [[99.0, 0.0], [0.0, 8.0]]]), 4)
    assert colours.shape == (2, 3, 4, 4)
    assert [tuple(colours[0, :, y, x]) for y, x in ((1, 1), (0, 2), (3, 0), (3, 3))] == [
        BLACK, (255, 0, 0), (255, 255, 0), WHITE,
    ]  # fmt: skip
    assert tuple(colours[1, :, 0, 0]) == WHITE
    assert tuple(colours[1, :, 3, 3]) == (255, 128, 0)


def test_a_panel_is_as_wide_as_its_title() -> None:
    images = np.zeros((1, 3, 8, 8), np.uint8)
    short, long = (side_by_side([Panel(title, images)] * 2, 1).width for title in ("a", "a title of many words"))
    assert short < 60
    assert long > 200
