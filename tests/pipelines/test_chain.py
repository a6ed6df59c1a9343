"""The whole chain, run as a user runs it: each command on what the one before made, stopped and resumed, exit codes and JSON."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokenizer
import vqmill
from pipelines.cli import app
from pipelines.options import FitFlags
from pipelines.training_state import TrainingState
from vqmill.layout import smallest_codec
from vqmill.verify import verify_store

TINY = """[tokenizer]
size = 16
codebook_size = 32
code_dim = 8
hidden_dim = 16
residual_dim = 8
num_residual_blocks = 1
"""


def run(*words: str | Path) -> int:
    """The exit code of `vqmill WORDS`."""
    try:
        return app([str(word) for word in words]) or 0  # --help returns nothing
    except SystemExit as end:
        return int(end.code or 0)


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def train(scenes: str, out: Path, *more: str | Path, steps: int = 12) -> int:
    config = out.parent / f"{out.name}.toml"
    config.write_text(TINY)
    return run(
        "train-tokenizer", scenes, "--out", out, "--config", config, "--steps", str(steps), "--batch-size", "16", *more
    )


@pytest.mark.usefixtures("ray_session")
def test_the_whole_chain(scenes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok, codes, prior = tmp_path / "tok", tmp_path / "codes.zarr", tmp_path / "prior"

    assert train(scenes, tok, "--json") == 0
    report = last_json(capsys)
    assert {
        "seen",
        "encoded",
        "quarantined",
        "skipped",
        "rows",
        "seconds",
        "nmse",
        "psnr",
        "top/used_codes",
    } <= report.keys()
    assert sorted(path.name for path in tok.iterdir()) == [
        "metrics.jsonl", "quarantine.parquet", "reconstructions.png", "run.json", "settings.json", "tokenizer.safetensors",
    ]  # fmt: skip
    record = json.loads((tok / "run.json").read_bytes())
    assert record["settings"]["fit"]["steps"] == 12
    assert record["fingerprint"] == tokenizer.load(tok).fingerprint

    assert (
        run("tokenize", scenes, "--tokenizer", tok, "--out", codes, "--workers", "1", "--shard-rows", "64", "--dry-run")
        == 0
    )
    assert not codes.exists()
    capsys.readouterr()
    assert (
        run("tokenize", scenes, "--tokenizer", tok, "--out", codes, "--workers", "1", "--shard-rows", "64", "--json")
        == 0
    )
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    assert (report["seen"], report["encoded"], report["rows"], report["quarantined"]) == (300, 300, 300, 0)
    size = sum(file.stat().st_size for file in codes.rglob("*") if file.is_file())
    assert report["store_bytes"] == size
    grids = "top 2x2 of 32 codes, bottom 4x4 of 32 codes"
    assert f"{codes}: 300 rows of {grids}; {size / 1e6:.2f} MB on disk, 0 samples quarantined\n" in printed
    assert re.search(r"\nthis run: 300 rows in [\d.]+ s, start-up included \([\d,]+ rows/s\)\n", printed)
    assert printed.splitlines()[-2] == f"next: vqmill train-prior {codes} --out DIR"
    assert run("tokenize", scenes, "--tokenizer", tok, "--out", codes, "--workers", "1", "--shard-rows", "64") == 0
    assert "\nnothing to do: it was finished before\n" in capsys.readouterr().out

    assert run("inspect", codes, "--json") == 0
    assert last_json(capsys)["kind"] == "store"
    assert run("inspect", tok, "--json") == 0
    assert last_json(capsys)["kind"] == "tokenizer"
    assert run("inspect", scenes, "--json") == 0
    assert (report := last_json(capsys))["kind"] == "corpus"
    assert (report["seen"], report["classes"]) == (300, 4)
    assert run("verify", codes, "--json") == 0
    assert last_json(capsys)["problems"] == []

    grid = tmp_path / "grid.png"
    assert run("decode", codes, "--out", grid, "--rows", "60:70", "--originals", scenes) == 0
    with Image.open(grid) as picture:
        assert picture.width > 4 * 64
    assert run("decode", codes, "--out", grid, "--rows", "0:4", "--originals", scenes) == 2, "another picture is there"

    command = ("train-prior", codes, "--out", prior, "--preset", "pixelcnn-tiny", "--steps", "5", "--json")
    assert run(*command) == 0
    report = last_json(capsys)
    assert set(report["evaluation"]) == {"top", "bottom"}
    assert {"bits_per_code", "uniform_bits_per_code", "unigram_bits_per_code"} <= report["evaluation"]["top"].keys()
    assert run(*command) == 0
    assert last_json(capsys)["fingerprint"] == report["fingerprint"]
    assert run("inspect", prior, "--json") == 0
    assert last_json(capsys)["kind"] == "prior"

    drawn = tmp_path / "drawn.zarr"
    sampled = (
        "sample",
        prior,
        "--tokenizer",
        tok,
        "--num",
        "6",
        "--label",
        "each",
        "--out",
        tmp_path / "s.png",
        "--codes",
        drawn,
        "--json",
    )
    assert run(*sampled) == 0
    assert last_json(capsys)["rows"] == 6
    assert vqmill.open_codes(drawn).labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert verify_store(drawn).problems == ()
    found = vqmill.open_codes(drawn)
    assert found.spec.codec == smallest_codec(found.spec, {name: found[name][:] for name in found.levels})
    assert found.spec.segments[0].num_samples == 6
    assert run("sample", prior, "--tokenizer", tok, "--num", "2", "--seed", "9", "--out", tmp_path / "t.png") == 0
    assert run(*sampled) == 0, "the same again is no error"


def test_a_stopped_training_ends_as_an_uninterrupted_one(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(scenes, tmp_path / "whole", steps=20) == 0
    settings = tmp_path / "stopped.toml"
    real = TrainingState.save

    def save_and_stop(state: Any) -> None:
        real(state)
        if state.done == 20:
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", save_and_stop)

    def train_stopped() -> int:
        settings.write_text(TINY + "[fit]\nsave_every = 8\n")
        return run(
            "train-tokenizer",
            scenes,
            "--out",
            tmp_path / "stopped",
            "--config",
            settings,
            "--steps",
            "20",
            "--batch-size",
            "16",
        )

    assert train_stopped() == 1
    assert not (tmp_path / "stopped").exists()
    assert train_stopped() == 1
    assert train_stopped() == 0
    found = [tokenizer.load(tmp_path / name).fingerprint for name in ("whole", "stopped")]
    assert found[0] == found[1]


def test_tensorboard_events_lie_beside_the_metrics(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(scenes, tmp_path / "tok", "--tensorboard", steps=3) == 0
    assert len(list((tmp_path / "tok" / "tensorboard").iterdir())) == 1
    monkeypatch.setattr("pipelines.training_log.find_spec", lambda name: None)
    assert train(scenes, tmp_path / "other", "--tensorboard", steps=3) == 2
    assert not list(tmp_path.glob("other*[!l]")), "nothing was begun"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")  # Ray Train warns of itself
@pytest.mark.usefixtures("ray_session")
def test_two_workers_train_on_ray(scenes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(scenes, tmp_path / "tok", "--workers", "2", "--json") == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ray Train has a handler of its own"
    both = last_json(capsys)
    assert train(scenes, tmp_path / "alone", "--json") == 0
    alone = last_json(capsys)
    assert both["nmse"] == pytest.approx(alone["nmse"], rel=0.2), "two workers see the same batches as one"


@pytest.mark.usefixtures("ray_session")
def test_bad_samples_end_with_exit_code_3(
    scenes: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        Image.fromarray(np.full((20, 20, 3), 40 * index, np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (folder / "notes.txt").write_text("not an image")
    words = (
        "tokenize",
        folder,
        "--tokenizer",
        tokenizer_folder,
        "--out",
        tmp_path / "c.zarr",
        "--workers",
        "1",
        "--json",
    )
    assert run(*words) == 3
    report = last_json(capsys)
    assert (report["seen"], report["encoded"], report["quarantined"], report["skipped"]) == (8, 6, 1, 1)
    assert run(*words) == 3
    assert last_json(capsys)["resumed_rows"] == 6
    assert run("inspect", folder) == 3
    assert run("verify", tmp_path / "c.zarr") == 3
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    arguments = (
        "--out",
        tmp_path / "tok",
        "--config",
        config,
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--holdout",
        "0.3",
        "--json",
    )
    assert run("train-tokenizer", folder, *arguments) == 3
    assert last_json(capsys)["quarantined"] == 1


def test_verify_names_damage_with_exit_code_1(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "codes.zarr"
    shutil.copytree(reference, damaged)
    path = damaged / "bottom/c/3/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    assert run("verify", damaged, "--json") == 1
    problems = last_json(capsys)["problems"]
    assert len(problems) == 1
    assert problems[0]["file"] == "bottom/c/3/0/0"
    assert problems[0]["rows"] == [60, 79]


def test_an_output_with_other_settings_is_refused(
    scenes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(scenes, tmp_path / "tok", steps=3) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "tok").iterdir()}
    assert train(scenes, tmp_path / "tok", steps=4) == 2
    assert "fit.steps: there 3, now 4" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "tok").iterdir()} == before


@pytest.mark.usefixtures("ray_session")
def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    report = last_json(capsys)
    assert report["versions"]["torch"]
    assert report["devices"]
    assert "compiled code" in report["reading"] or "pip install 'vqmill[fast]'" in report["reading"]


@pytest.mark.usefixtures("ray_session")
def test_the_demo_ends_in_a_picture_and_goes_on_when_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pipelines.demo

    monkeypatch.setattr(pipelines.demo, "IMAGES", 64)
    monkeypatch.setattr(pipelines.demo, "CONFIG", TINY.replace("size = 16", "size = 32") + "start_step = 1\n")
    monkeypatch.setattr(pipelines.demo, "TOKENIZER_FLAGS", FitFlags(steps=4, batch_size=8, device="cpu"))
    monkeypatch.setattr(pipelines.demo, "PRIOR_FLAGS", FitFlags(steps=2, device="cpu"))
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--json") == 0
    assert last_json(capsys)["picture"] == str(out / "demo.png")
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 5 * 4 * 64
    (out / "demo.png").unlink()
    assert run("demo", "--out", out) == 0
    assert (out / "demo.png").exists()
    assert run("decode", out / "codes.zarr", "--out", tmp_path / "x.png") == 0, "the store knows its tokenizer"
    (tmp_path / "mine").mkdir()
    assert run("demo", "--out", tmp_path / "mine") == 2
