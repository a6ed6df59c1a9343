"""--gzip-tars: every command that reads a corpus takes packed tars with it, and no other command takes it for nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqmill
from pipelines.cli import app

TINY = "[tokenizer]\nsize = 16\ncodebook_size = 16\ncode_dim = 4\nhidden_dim = 8\nresidual_dim = 4\nnum_residual_blocks = 1\n"


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def packed(scenes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tars of `scenes`, packed."""
    folder = tmp_path_factory.mktemp("packed")
    for path in Path(scenes).parent.glob("*.tar"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder


@pytest.mark.usefixtures("ray_session")
def test_the_rows_are_those_of_the_plain_tars(
    packed: Path, scenes: str, tokenizer_folder: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"
    words = ("--tokenizer", tokenizer_folder, "--out", out, "--shard-rows", "20", "--workers", "2")
    assert run("tokenize", packed, *words) == 2, "unasked"
    assert run("tokenize", packed, *words, "--gzip-tars") == 0
    mine, plain = vqmill.open_codes(out), vqmill.open_codes(reference)
    for level in plain.levels:
        assert np.array_equal(mine[level][:], plain[level][:])
    assert mine.samples(0, 300).drop(["source"]) == plain.samples(0, 300).drop(["source"])
    assert mine.spec.segments[0].plan != plain.spec.segments[0].plan
    for name, corpus, words in (("mine", packed, ["--gzip-tars"]), ("plain", scenes, [])):
        picture = tmp_path / f"{name}.png"
        assert run("decode", out if name == "mine" else reference, "--tokenizer", tokenizer_folder, "--rows", "95:110", "--out", picture, "--originals", corpus, *words) == 0  # fmt: skip
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("mine", "plain")))
    assert run("decode", out, "--tokenizer", tokenizer_folder, "--out", tmp_path / "x.png", "--originals", packed) == 2


def test_training_evaluation_and_inspection(
    packed: Path, scenes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ("--steps", "4", "--batch-size", "4", "--config", tmp_path / "tiny.toml", "--json")
    found = {}
    for name, corpus, flag in (("mine", packed, ["--gzip-tars"]), ("plain", scenes, [])):
        assert run("train-tokenizer", corpus, "--out", tmp_path / name, *words, *flag) == 0
        trained = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert run("evaluate", tmp_path / name, corpus, "--json", *flag) == 0
        evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert run("inspect", corpus, "--json", *flag) == 0
        inspected = json.loads(capsys.readouterr().out.splitlines()[-1])
        found[name] = (
            trained["fingerprint"], evaluated["images"], evaluated["psnr"], inspected["encoded"], inspected["kinds"],
        )  # fmt: skip
    assert found["mine"] == found["plain"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train-tokenizer", "{packed}", "--out", "{out}"), "--gzip-tars"),
        (("evaluate", "{tokenizer}", "{packed}"), "--gzip-tars"),
        (("inspect", "{packed}"), "--gzip-tars"),
        (("inspect", "{tokenizer}", "--gzip-tars"), "says how a corpus is read, and this is none"),
        (("decode", "{store}", "--out", "{out}", "--gzip-tars"), "together with --originals"),
    ],
    ids=["train unasked", "evaluate unasked", "inspect unasked", "inspect no corpus", "decode no originals"],
)
def test_without_it_they_say_so_and_it_is_not_taken_for_nothing(
    words: tuple[str, ...], said: str, packed: Path, tokenizer_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    places = {"packed": packed, "tokenizer": tokenizer_folder, "store": reference, "out": tmp_path / "out.png"}
    assert run(*(word.format(**places) for word in words)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
