"""An unfinished store goes on as it began, or not at all: what differs is shown, and nothing is changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import tokenizer
from pipelines.cli import app
from vqmill.layout import group_metadata, read_spec


@pytest.fixture
def begun(reference: Path, tmp_path: Path) -> Path:
    """The first ten of fifteen Zarr shards, as a kill leaves them."""
    out = shutil.copytree(reference, tmp_path / "codes.zarr")
    spec = read_spec(out).with_progress(num_rows=200, num_commits=10, complete=False)
    (out / "zarr.json").write_bytes(group_metadata(spec))
    return out


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("tokenizer", 'tokenizer.fingerprint: there "'),
        ("size", "preprocessing.size: there 16, now 32"),
        ("order", 'plan: there "'),
        ("fewer", "It has more than this corpus: 300 samples, here are 200"),
        ("batch size", "tokenizer.batch_size: there 32, now 8"),
        ("rows", "rows_per_shard: there 20, now 40"),
        ("crop", 'preprocessing.fit: there "'),
    ],
)
def test_another_job_does_not_go_on_with_it(
    change: str, difference: str, begun: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path, stores: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = stores.files(begun)
    folder, flags = tokenizer_folder, {"--shard-rows": "20"}
    if change == "tokenizer":
        model = tokenizer.load(tokenizer_folder)
        next(iter(model.parameters())).data += 1
        tokenizer.save(model, folder := tmp_path / "other")
    more = {
        "size": {"--size": "32"},
        "batch size": {"--batch-size": "8"},
        "rows": {"--shard-rows": "40"},
        "crop": {"--fit": "pad"},
    }
    corpus = {"order": "{000000,000002,000001}", "fewer": "{000000..000001}"}.get(change, "{000000..000002}")
    flags |= more.get(change, {})
    words = [word for flag in flags.items() for word in flag]
    corpus = scenes.replace("{000000..000002}", corpus)
    assert app(["tokenize", corpus, "--tokenizer", str(folder), "--out", str(begun), "--device", "cpu", *words]) == 2
    said = capsys.readouterr().err
    assert difference in said
    assert scenes in said, "it is said what the store was made from"
    assert stores.files(begun) == before
