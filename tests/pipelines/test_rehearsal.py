"""`tokenize --dry-run`: the estimate is of what the job then does, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokenizer
from pipelines import rehearsal
from pipelines.cli import app
from pipelines.corpus.plan import plan_corpus
from pipelines.rehearsal import Rehearsal, rehearse
from pipelines.tokenize import TokenizeOptions, store_spec, tokenize_corpus
from vqmill.layout import group_metadata, read_spec
from vqmill.store import open_codes

OPTIONS = TokenizeOptions(size=16, rows_per_shard=20)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """120 images, every tenth of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(120):
        path = folder / f"{number:03d}.png"
        Image.effect_noise((24, 20), number).convert("RGB").save(path)
        if number % 10 == 3:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def test_it_tells_what_the_job_does(
    photos: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    out = tmp_path / "codes.zarr"
    command = [
        "tokenize", str(photos), "--tokenizer", str(tokenizer_folder), "--out", str(out), "--shard-rows", "20", "--workers", "1", "--json",
    ]  # fmt: skip

    def estimate() -> dict[str, Any]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert app([*command, "--dry-run"]) == 0
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        text = capsys.readouterr().out
        return {**json.loads(text.splitlines()[-1]), "text": text}

    first = estimate()
    assert (first["rehearsed_samples"], first["estimated_rows"], first["rehearsed_reasons"]) == (
        120,
        108,
        {"truncated": 12},
    )
    assert first["estimated_seconds"] > 0
    assert "quarantined: 12 truncated" in first["text"]
    assert app(command) == 3
    capsys.readouterr()
    stored = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and ".zarr/zarr.json" not in str(path)
    )
    codes = sum(
        path.stat().st_size for level in ("top", "bottom") for path in (out / level / "c").rglob("*") if path.is_file()
    )
    assert codes < first["estimated_bytes"] < stored

    done = estimate()
    assert done["samples_to_do"] == 0
    assert "estimated_seconds" not in done
    assert "108 rows are committed already" in done["text"]

    # As a kill leaves it: two Zarr shards of six are committed.
    spec = read_spec(out)
    (out / "zarr.json").write_bytes(
        group_metadata(replace(spec.with_progress(num_rows=40, num_commits=2, complete=False)))
    )
    stopped = estimate()
    assert stopped["samples_to_do"] == 120, "all of them are one span"
    assert "would go on: 40 rows are committed already (33.3% of the samples)" in stopped["text"]
    assert app(command) == 3
    assert len(open_codes(out)) == 108
    capsys.readouterr()

    for number in range(120, 130):
        Image.effect_noise((24, 20), number).convert("RGB").save(photos / f"{number:03d}.png")
    more = estimate()
    assert (more["samples_to_do"], more["rehearsed_samples"], more["estimated_rows"]) == (10, 10, 10)
    assert "would append 10 samples to 108 rows" in more["text"]
    (photos / "003.png").write_bytes((photos / "000.png").read_bytes())
    command.append("--retry-quarantined")
    assert estimate()["samples_to_do"] == 12


def test_it_looks_into_input_shards_all_over_the_corpus_and_stops_in_time(
    scenes: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shards = tokenizer.load(tokenizer_folder), plan_corpus(scenes).shards
    monkeypatch.setattr(rehearsal, "PLACES", 2)
    tried = rehearse([*shards, *shards, *shards], model, OPTIONS, lambda done: None)
    assert tried.seen == shards[0].num_samples + shards[1].num_samples, "the first, and the one in the middle"
    monkeypatch.setattr(rehearsal, "SECONDS", 1e-9)
    assert rehearse(shards, model, OPTIONS, lambda done: None).seen == shards[0].num_samples, "one span at least"


def test_time_is_that_of_the_workers_or_of_the_cores_if_these_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal.os, "cpu_count", lambda: 2)
    tried = Rehearsal(seen=100, seconds=4.0, cpu_seconds=5.0)
    assert tried.job_seconds(1000, workers=1) == 40
    assert tried.job_seconds(1000, workers=2) == 25, "two workers would need two and a half cores"
    assert tried.job_seconds(1000, workers=8) == 25


def test_the_size_is_that_of_the_store(scenes: str, tokenizer_folder: Path, tmp_path: Path, ray_session: None) -> None:
    plan, model, options = plan_corpus(scenes), tokenizer.load(tokenizer_folder), replace(OPTIONS, rows_per_shard=300)
    tried = rehearse(plan.shards, model, options, lambda done: None)
    tokenize_corpus(plan, model, tmp_path / "codes.zarr", options, lambda *shown: None)
    codes = open_codes(tmp_path / "codes.zarr")
    places = ("top/c", "bottom/c", "samples")
    stored = sum(
        path.stat().st_size for name in places for path in (codes_path(tmp_path) / name).rglob("*") if path.is_file()
    )
    assert tried.row_bytes(store_spec(plan, model, options)) * len(codes) == pytest.approx(stored, rel=0.02)


def codes_path(folder: Path) -> Path:
    return folder / "codes.zarr"
