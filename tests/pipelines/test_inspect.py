"""The command `inspect`, of what other commands made or have begun to make: what it is, how far, and by which command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import priors
from pipelines.cli import app
from pipelines.outputs import recorded_command
from pipelines.training_state import TrainingState

TINY = """[tokenizer]
size = 16
codebook_size = 32
code_dim = 8
hidden_dim = 16
residual_dim = 8
num_residual_blocks = 1
start_step = 1
[fit]
save_every = 8
validate_every = 5
"""
PRIOR = ("--preset", "pixelcnn-tiny", "--steps", "20", "--batch-size", "8")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `vqmill WORDS` as typed."""

    def typed(*words: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["vqmill", *map(str, words)])
        return app([str(word) for word in words])

    return typed


@pytest.fixture
def inspected(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """What inspect says to people, and its JSON line."""

    def look(path: Path) -> tuple[str, dict[str, Any]]:
        capsys.readouterr()
        assert run("inspect", path, "--json") == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return "\n".join(lines), json.loads(last)

    return look


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has Ctrl-C come with the resume point of a step."""
    real = TrainingState.save

    def choose(step: int) -> None:
        def save_and_stop(state: TrainingState) -> None:
            real(state)
            if state.done == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(TrainingState, "save", save_and_stop)

    return choose


def test_an_evaluation_is_told_as_it_was(
    run: Callable[..., int], inspected: Any, scenes: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    out = tmp_path / "evaluation"
    words = ("evaluate", tokenizer_folder, scenes, "--limit", "16", "--out", out)
    assert run(*words) == 0
    figures = capsys.readouterr().out
    text, facts = inspected(out)
    command = f"vqmill evaluate {tokenizer_folder} '{scenes}' --limit 16 --out {out}"
    assert text == f"{out}: an evaluation of a tokenizer\n{figures}made by: {command}"
    assert (facts["kind"], facts["images"], facts["encoded"]) == ("evaluation", 16, 16)
    (out / "evaluation.json").write_text("{}")
    assert run("inspect", out) == 1
    assert f"{out}: its records cannot be read (KeyError" in capsys.readouterr().err


def test_scores_are_told_with_their_main_figures(
    run: Callable[..., int], inspected: Any, make_store: Callable[..., Path], tmp_path: Path, no_fsync: None
) -> None:
    store, prior, out = make_store(tmp_path / "codes.zarr", 21), tmp_path / "prior", tmp_path / "scores"
    torch.manual_seed(0)
    levels = [priors.LevelShape("top", 512, (2, 3)), priors.LevelShape("bottom", 200, (4, 6))]
    model = priors.from_preset("pixelcnn-tiny", levels, 3, "0" * 32, depth=8, num_layers=1)
    priors.save(model, prior)
    assert run("score", prior, store, "--rows", "2:20", "--out", out, "--num", "2") == 0
    text, facts = inspected(out)
    record = json.loads((out / "score.json").read_bytes())
    assert text.startswith(f"{out}: scores of rows by a prior\n")
    assert f"{prior} (prior {model.fingerprint}) on {store}: 18 rows, 2..19" in text
    for level in record["levels"]:
        assert f"level {level['name']}: {level['bits_per_code']:.3f} bits per code (uniform " in text
    assert f"in all: {record['bits_per_code']:.3f} bits per code, {record['bits']:,.1f} a row" in text
    assert f"least likely:\n  row {record['least_likely'][0]['row']}: " in text
    odd = record["oddest_of_label"][0]
    assert f"least likely beside others of their label:\n  row {odd['row']}: " in text
    assert f"label_z {odd['label_z']:+.2f}" in text
    assert text.endswith(f"made by: vqmill score {prior} {store} --rows 2:20 --out {out} --num 2")
    assert (facts["kind"], facts["rows"], facts["bits"]) == ("scores", 18, record["bits"])
    (out / "score.json").unlink()
    assert run("inspect", out) == 1


def test_a_stopped_training_says_how_far_it_is_and_how_to_go_on(
    run: Callable[..., int], inspected: Any, stop_at: Callable[[int], None], scenes: str, tmp_path: Path
) -> None:
    config, out = tmp_path / "tiny.toml", tmp_path / "tok"
    config.write_text(TINY)
    words = ("train-tokenizer", scenes, "--out", out, "--config", config, "--steps", "20", "--batch-size", "16")
    stop_at(8)
    assert run(*words, "--json") == 1
    text, facts = inspected(out)
    assert text == inspected(tmp_path / "tok.partial")[0], "OUT leads to OUT.partial"
    assert f"{out}.partial: an unfinished run of train-tokenizer" in text
    assert "\nstep 8 of 20, resume point at step 8\n  last evaluation, step 5: loss " in text
    assert ", psnr " in text
    again = f"vqmill train-tokenizer '{scenes}' --out {out} --config {config} --steps 20 --batch-size 16"
    assert text.endswith(f"to go on with it: {again}")
    assert (facts["kind"], facts["command"], facts["again"], facts["trained"]) == (
        "unfinished",
        "train-tokenizer",
        again,
        [],
    )
    stop_at(16)
    assert run(*words) == 1
    metrics = [json.loads(line) for line in (tmp_path / "tok.partial/work/metrics.jsonl").read_text().splitlines()]
    (loss,) = (line["loss"] for line in metrics if line["step"] == 10 and "loss" in line)
    text, facts = inspected(out)
    assert f"step 16 of 20, resume point at step 16; loss {loss:.4g}\n  last evaluation, step 15: loss " in text
    assert facts["progress"][""]["loss"] == loss
    (tmp_path / "tok.partial/run.json").unlink()
    assert inspected(out)[0].endswith("to go on with it, give the same command again")
    stop_at(0)
    assert run(*words) == 0
    record = json.loads((out / "run.json").read_bytes())
    assert "finished" in record
    assert "started" not in record
    assert inspected(out)[0].endswith(f"made by: {again}")


def test_levels_are_told_one_by_one(
    run: Callable[..., int], inspected: Any, stop_at: Callable[[int], None], make_store: Callable[..., Path], tmp_path: Path,
    no_fsync: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store, out = make_store(tmp_path / "codes.zarr", 40), tmp_path / "prior"
    config = tmp_path / "fit.toml"
    config.write_text("[fit]\nsave_every = 10\n")
    words = ("train-prior", store, "--out", out, "--config", config, *PRIOR)
    assert run(*words, "--level", "top") == 0
    text, facts = inspected(out)
    assert "\nlevel top: trained, 20 steps; loss " in text
    assert "\nlevel bottom: not begun\n" in text
    assert facts["trained"] == ["top"]
    stop_at(10)
    assert run(*words) == 1
    text, facts = inspected(out)
    assert "\nlevel bottom: step 10 of 20, resume point at step 10; loss " in text
    assert (facts["trained"], facts["progress"]["bottom"]["resume_step"]) == (["top"], 10)
    (tmp_path / "prior.partial/work/bottom/resume.safetensors").unlink()
    assert "\nlevel bottom: step 10 of 20, no resume point yet; loss " in inspected(out)[0]
    (tmp_path / "prior.partial/settings.json").write_text('{"command": "train-prior"}')
    assert run("inspect", out) == 1
    assert f"{out}.partial: its records cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "out", "untrained", "expected"),
    [
        (
            ["sample", "p", "--out", "s.png", "--codes", "a.zarr"],
            "b.zarr",
            (),
            "vqmill sample p --out s.png --codes b.zarr",
        ),
        (
            ["train-prior", "c", "--level", "top", "--out", "p"],
            "q",
            ("bottom",),
            "vqmill train-prior c --level=bottom --out q",
        ),
        (
            ["train-prior", "c", "--level=top", "--out=p"],
            "q",
            ("top", "bottom"),
            "vqmill train-prior c --level=top --out=q",
        ),
        (
            ["train-prior", "c", "--level", "top", "--out", "p"],
            "q",
            ("all",),
            "vqmill train-prior c --level=all --out q",
        ),
    ],
    ids=["sampled codes", "another level", "the same level", "all levels"],
)
def test_recorded_commands_make_what_they_are_told_of(
    words: list[str], out: str, untrained: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"command": ["vqmill", *words], "folder": str(Path.cwd())}))
    assert recorded_command(record, Path(out), untrained) == expected


def test_the_folder_that_one_is_in_can_be_inspected(
    inspected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = priors.LevelShape("codes", 8, (2, 2))
    config = priors.preset_config("pixelcnn-tiny", [shape], 2, "0" * 32)
    priors.save(priors.Prior(config, ("cat", "dog")), tmp_path / "prior")
    monkeypatch.chdir(tmp_path / "prior")
    text, facts = inspected(".")
    assert text.startswith(".: a prior, ")
    assert "  classes: 0 cat, 1 dog\n" in f"{text}\n"
    assert facts["class_names"] == ["cat", "dog"]


def test_a_checkpoint_says_how_good_its_training_found_it(
    run: Callable[..., int], inspected: Any, make_store: Callable[..., Path], tmp_path: Path, no_fsync: None
) -> None:
    store, out = make_store(tmp_path / "codes.zarr", 40), tmp_path / "prior"
    assert run("train-prior", store, "--out", out, *PRIOR) == 0
    record = json.loads((out / "run.json").read_bytes())
    bits = record["evaluation"]["bottom"]["bits_per_code"]
    assert f"\nlevel bottom: {bits:.3f} bits per held-out code (uniform " in inspected(out)[0]
    (out / "run.json").write_text(json.dumps(record | {"fingerprint": "another"}))
    assert "held-out" not in inspected(out)[0]
