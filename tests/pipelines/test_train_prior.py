"""The commands `train-prior` and `sample`: what they refuse, levels by themselves, completions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import priors
from pipelines.cli import app
from vqmill import open_codes
from vqmill.spec import LevelSpec

FLAGS = ("--preset", "pixelcnn-tiny", "--steps", "6")


def run(*arguments: object) -> int:
    return app([str(argument) for argument in arguments])


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


def test_a_table_of_a_level_is_that_level_s_recipe(
    make_store: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_fsync: None
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[fit]\nsteps = 4\nprecision = "bf16"\n[fit.bottom]\nsteps = 40\nprecision = "fp32"\n')
    store, out = make_store(tmp_path / "codes.zarr", 40), tmp_path / "prior"
    assert run("train-prior", store, "--out", out, "--preset", "pixelcnn-tiny", "--config", config) == 0
    settings = json.loads((out / "run.json").read_bytes())["settings"]["fit"]
    assert [(settings[level]["steps"], settings[level]["precision"]) for level in ("top", "bottom")] == [
        (4, "bf16"), (40, "fp32"),
    ]  # fmt: skip
    steps = [
        max(json.loads(line)["step"] for line in (out / f"metrics-{level}.jsonl").read_text().splitlines())
        for level in ("top", "bottom")
    ]
    assert steps == [4, 40]
    said = capsys.readouterr()
    assert "a short run, of 4 steps: warmup_steps is 1 instead of 20" in said.out + said.err
    assert "a short run, of 40 steps: warmup_steps is 4 instead of 20" in said.out + said.err
    config.write_text("[fit.middle]\nsteps = 4\n")
    assert run("train-prior", store, "--out", tmp_path / "x", "--config", config) == 2
    assert "[fit.middle]: the levels are 'top', 'bottom'." in capsys.readouterr().err


def test_each_level_may_be_trained_with_its_own_flags(
    make_store: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_fsync: None
) -> None:
    store, out = make_store(tmp_path / "codes.zarr", 40), tmp_path / "prior"
    words = ("train-prior", store, "--out", out, "--preset", "pixelcnn-tiny")
    assert run(*words, "--level", "top", "--steps", 4) == 0
    assert run("inspect", out) == 0
    said = capsys.readouterr().out
    assert "level top: trained, 4 steps" in said
    assert "level bottom: not begun" in said
    assert run(*words, "--level", "top", "--steps", 5) == 2
    said = capsys.readouterr().err
    assert "fit.top.steps: there 4, now 5" in said
    assert "With --level the flags are of that level alone." in said
    assert run(*words, "--level", "bottom", "--steps", 7) == 0
    steps = json.loads((out / "run.json").read_bytes())["settings"]["fit"]
    assert [steps[level]["steps"] for level in ("top", "bottom")] == [4, 7]
    assert run(*words, "--level", "bottom", "--steps", 7) == 0, "again is no harm"
    assert run(*words, "--level", "bottom", "--steps", 8) == 2
    assert "fit.bottom.steps: there 7, now 8" in capsys.readouterr().err


def test_auto_goes_on_with_what_a_run_was_begun_with(
    make_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_fsync: None
) -> None:
    store, out = make_store(tmp_path / "codes.zarr", 40), tmp_path / "prior"
    words = ("train-prior", store, "--out", out, "--preset", "pixelcnn-tiny", "--steps", 4, "--precision", "auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert run(*words, "--level", "top") == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert run(*words) == 0
    fits = json.loads((out / "run.json").read_bytes())["settings"]["fit"]
    assert [fits[level]["precision"] for level in ("top", "bottom")] == ["bf16", "fp32"]


def test_levels_by_themselves_give_the_same_prior(
    make_store: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_fsync: None
) -> None:
    store = make_store(tmp_path / "codes.zarr", 40)
    assert run("train-prior", store, "--out", tmp_path / "all", *FLAGS) == 0
    out = tmp_path / "each"
    assert run("train-prior", store, "--out", out, "--level", "bottom", *FLAGS) == 0
    printed = capsys.readouterr().out
    assert "still to train: top" in printed
    assert "--level top" in printed
    assert not out.exists()
    assert run("inspect", f"{out}.partial") == 0
    assert "an unfinished run of train-prior" in (said := capsys.readouterr().out)
    assert "level bottom: trained, " in said
    assert run("train-prior", store, "--out", out, "--level", "bottom", *FLAGS) == 0, "again is no harm"
    assert run("train-prior", store, "--out", out, "--level", "top", *FLAGS) == 0
    assert run("inspect", out) == 0
    assert "level bottom: 4x6 codes of 200; kind pixelcnn, depth 32, num_layers 4" in capsys.readouterr().out
    whole, parts = (json.loads((tmp_path / name / "run.json").read_bytes()) for name in ("all", "each"))
    assert whole["fingerprint"] == parts["fingerprint"]
    assert priors.load(out).class_names == ("cat", "dog"), "of the store"
    assert whole["evaluation"] == parts["evaluation"]
    assert run("train-prior", store, "--out", store / "x", *FLAGS) == 2
    assert f"lies inside the store {store}" in capsys.readouterr().err
    assert run("train-prior", store, "--out", tmp_path / "x", "--level", "botom", *FLAGS) == 2
    assert "--level botom: expected top, bottom, all. Did you mean 'bottom'?" in capsys.readouterr().err


def test_codes_that_say_little_are_warned_of(
    stores: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_fsync: None
) -> None:
    codes = stores.codes(stores.two_levels, 40)
    codes["top"][:] = codes["top"][:] % 50 == 0  # nearly always 0
    store = stores.write(tmp_path / "codes.zarr", stores.two_levels, codes)
    assert run("train-prior", store, "--out", tmp_path / "prior", *FLAGS) == 0
    warned = [
        line for line in capsys.readouterr().err.splitlines() if "there is little that a prior could learn" in line
    ]
    assert len(warned) == 1
    assert warned[0].startswith("level top: its codes carry 1.")  # smoothed, on few codes


@pytest.fixture(scope="session")
def trained(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior over the codes of `reference`, trained for a few steps, with labels hidden now and then."""
    out = tmp_path_factory.mktemp("prior") / "prior"
    assert run("train-prior", reference, "--out", out, *FLAGS) == 0
    return out


def test_completions_keep_the_upper_part(
    trained: Path, reference: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sample", trained, "--tokenizer", tokenizer_folder, "--complete", reference)
    assert (
        run(*command, "--rows", "3:7", "--keep", "0.5", "--codes", tmp_path / "s.zarr", "--out", tmp_path / "s.png")
        == 0
    )
    assert "4 images, seed 0, the rows' own labels" in capsys.readouterr().out.replace("\n", " ")
    whole, found = open_codes(reference), open_codes(tmp_path / "s.zarr")
    assert len(found) == 4
    for level in whole.levels:
        kept = whole[level].shape[1] // 2
        assert np.array_equal(found[level][:, :kept], whole[level][3:7, :kept])
    assert not np.array_equal(found["bottom"][:], whole["bottom"][3:7])
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 3 * 2 * 64  # three panels of two images in a row


def test_sampled_stores_know_what_they_are_of(
    trained: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sample", trained, "--tokenizer", tokenizer_folder)
    for seed in (1, 2):
        drawn = ("--num", 4, "--seed", seed, "--codes", tmp_path / f"{seed}.zarr", "--out", tmp_path / f"{seed}.png")
        assert run(*command, *drawn) == 0
    completed = ("--rows", "0:4", "--codes", tmp_path / "o.zarr")
    assert run(*command, "--complete", tmp_path / "1.zarr", *completed, "--out", tmp_path / "a.png") == 0
    assert run(*command, "--complete", tmp_path / "2.zarr", *completed, "--out", tmp_path / "b.png") == 2
    assert "exists with other settings" in capsys.readouterr().err


def test_options_of_drawing_reach_the_codes(trained: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    def codes(name: str, *options: object) -> torch.Tensor:
        command = ("sample", trained, "--tokenizer", tokenizer_folder, "--num", 6, "--label", "each", *options)
        assert run(*command, "--codes", tmp_path / f"{name}.zarr", "--out", tmp_path / f"{name}.png") == 0
        return torch.from_numpy(open_codes(tmp_path / f"{name}.zarr")["bottom"][:].astype(np.int64))

    model, labels = priors.load(trained), torch.arange(6) % 4
    for name, options, drawing in (
        ("plain", (), priors.Drawing()),
        ("cold", ("--temperature", 0.5, "--top-k", 5, "--top-p", 0.9), priors.Drawing(0.5, 5, 0.9)),
        ("guided", ("--guidance", 3), priors.Drawing(guidance=3)),
        ("best", ("--candidates", 3), priors.Drawing(candidates=3)),
    ):
        expected = priors.sample(model, 6, labels, drawing=drawing)["bottom"]
        assert torch.equal(codes(name, *options), expected), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "0:4"), "--rows says what of the store that --complete names"),
        (("--num", 0), "--num must be at least 1"),
        (("--complete", "STORE", "--num", 3), "as many images are made as --rows chooses"),
        (("--keep", 0.3), "--keep says what of the store that --complete names is taken"),
        (
            ("--complete", "STORE", "--keep", 0.9),
            "would keep 2 of the 2 rows of level 'top', so that nothing is left to draw. Take 0.50, or between",
        ),
        (
            ("--complete", "STORE", "--keep", "nan"),
            "would keep 0 of the 2 rows of level 'top'",
        ),
        (
            ("--complete", "STORE", "--keep", 0.1),
            "would keep 0 of the 2 rows of level 'top', so that nothing is left to keep",
        ),
        (("--seed", -1), "--seed: expected a whole number"),
        (("--complete", "STORE", "--rows", "400:"), "no rows there"),
        (("--complete", "STORE", "--rows", "290:310"), "rows 300:310 are not there; the store has rows 0:300"),
        (("--complete", "OTHER"), "models the codes of tokenizer"),
        (
            ("--guidance", 2),
            "--guidance: would compare a class to any class, so every sample needs a class, not -1: give --label.",
        ),
        (("--candidates", 2), "--candidates: would compare"),
        (("--guidance", 2, "--candidates", 2), "--guidance and --candidates: would compare"),
        (("--top-p", 0), "--top-p: expected a probability"),
        (("--top-k", -1), "--top-k: expected a whole number"),
        (("--temperature", -1), "--temperature: expected a number"),
        (("--candidates", 0), "--candidates: expected at least 1"),
        (
            ("--candidates", 2, "--temperature", 0),
            "--candidates 2 with --temperature 0: all of them would be the same. Raise --temperature.",
        ),
        (("--batch-size", 0), "--batch-size: expected at least 1, found 0."),
        (("--label", "cat"), "expected a class number 0..3, or each. This prior has no names for its classes"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_sampled_is_refused(
    trained: Path, reference: Path, finished_store: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...], message: str,
) -> None:  # fmt: skip
    places = {"STORE": reference, "OTHER": finished_store}
    command = [
        "sample",
        trained,
        "--tokenizer",
        tokenizer_folder,
        "--codes",
        tmp_path / "s.zarr",
        "--out",
        tmp_path / "s.png",
    ]
    assert run(*command, *(places.get(str(option), option) for option in options)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
