"""--fit, --max-image-memory, --background: from training to codes, figures and pictures, each of them seen in what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vqmill
from pipelines.cli import app
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.decode import original_images
from pipelines.options import ImageFlags
from pipelines.training_record import trained_images
from vqmill.errors import UsageError

TINY = "[tokenizer]\nsize = 16\ncodebook_size = 16\ncode_dim = 4\nhidden_dim = 8\nresidual_dim = 4\nnum_residual_blocks = 1\n"
PADDED = ("--fit", "pad", "--max-image-memory", "7", "--background", "0,255,0")


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty images of 64x32 whose outer quarters a crop cuts off, and one that takes 8 MB to decode."""
    folder = tmp_path_factory.mktemp("wide")
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    Image.new("RGB", (1000, 1000)).save(folder / "large.png")
    return str(folder)


@pytest.fixture(scope="module")
def padded(wide: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained with all three flags."""
    folder = tmp_path_factory.mktemp("padded")
    (folder / "tiny.toml").write_text(TINY)
    words = ("--steps", "8", "--batch-size", "4", "--holdout", "0.3", "--config", folder / "tiny.toml")
    assert run("train-tokenizer", wide, "--out", folder / "tok", *words, *PADDED) in (0, 3)
    return folder / "tok"


def test_training_records_them(padded: Path) -> None:
    found = json.loads((padded / "run.json").read_bytes())["settings"]["preprocessing"]
    assert (found["fit"], found["max_memory_bytes"], found["background"]) == ("pad", 7_000_000, [0, 255, 0])
    assert trained_images(padded, ImageFlags()) == ImageFlags("pad", 7.0, "0,255,0")
    assert trained_images(padded, ImageFlags("crop", 9, "1,2,3")) == ImageFlags("crop", 9, "1,2,3")


@pytest.mark.usefixtures("ray_session")
def test_tokenize_takes_those_of_the_training_or_its_own(padded: Path, wide: str, tmp_path: Path) -> None:
    stores = {}
    for name, words in {"trained": (), "crop": ("--fit", "crop"), "black": ("--background", "0,0,0")}.items():
        out = tmp_path / f"{name}.zarr"
        assert run("tokenize", wide, "--tokenizer", padded, "--out", out, "--workers", "1", *words) == 3
        stores[name] = vqmill.open_codes(out)
        assert stores[name].spec.preprocessing["fit"] == ("crop" if name == "crop" else "pad")
        assert len(stores[name]) == 20
        row = stores[name].quarantine().to_pylist()[0]
        assert (row["key"], row["reason"]) == ("large", "too_many_pixels")
        assert row["detail"].endswith("take 8 MB to decode; at most 7 MB are given (--max-image-memory)")
    for name in ("crop", "black"):
        assert not np.array_equal(stores[name]["bottom"][:], stores["trained"]["bottom"][:]), name
    out = tmp_path / "all.zarr"
    assert run("tokenize", wide, "--tokenizer", padded, "--out", out, "--workers", "1", "--max-image-memory", "9") == 0
    assert len(vqmill.open_codes(out)) == 21
    assert run("tokenize", wide, "--tokenizer", padded, "--out", out, "--workers", "1") == 2, (
        "another cap, another store"
    )

    plan = plan_corpus(wide)
    green = original_images(plan, stores["trained"], range(2), 16, 3)
    assert (green[:, :, 0].mean((0, 2)) == [0, 255, 0]).all(), "decode --originals shows what was encoded"
    assert not np.array_equal(original_images(plan, stores["crop"], range(2), 16, 3), green)


def test_evaluate_takes_those_of_the_training_or_its_own(
    padded: Path, wide: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = {}
    for name, words in {"trained": (), **{flag: (flag, value) for flag, value in zip(PADDED[::2], ("crop", "9", "0,0,0"), strict=True)}}.items():  # fmt: skip
        assert run("evaluate", padded, wide, "--all", "--json", *words) in (0, 3)
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trained"]["images"] == found["--fit"]["images"] == 20
    assert found["--max-image-memory"]["images"] == 21
    assert len({result["psnr"] for result in found.values()}) == 4


def test_without_a_record_they_are_the_usual_ones(tmp_path: Path) -> None:
    assert trained_images(tmp_path, ImageFlags()).preprocessing(16, 1) == Preprocessing(16, 1)
    assert trained_images(None, ImageFlags("pad")).preprocessing(16, 3) == Preprocessing(16, 3, "pad")
    old = {"size": 32, "crop": "center"}  # stores from before there was a choice
    assert ImageFlags().or_recorded(old).preprocessing(32, 3) == Preprocessing(32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (ImageFlags(max_image_memory=0.5), "--max-image-memory must be at least 1"),
        (ImageFlags(max_image_memory=float("nan")), "--max-image-memory must be at least 1"),
        (ImageFlags(background="white"), "--background 'white': expected R,G,B"),
        (ImageFlags(background="0,0,256"), "--background '0,0,256': expected R,G,B"),
        (ImageFlags(background="0,0"), "--background '0,0': expected R,G,B"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_values_out_of_range_are_refused(flags: ImageFlags, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        flags.preprocessing(16, 3)


@pytest.mark.parametrize("record", [{"max_memory_bytes": "much"}, {"background": 7}, {"background": ["red"]}], ids=str)
def test_a_record_that_is_none_of_ours_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"none of ours.*Give --fit"):
        ImageFlags().or_recorded(record)
