"""Damage, `repair`, the same `tokenize` command: the store has its old bytes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli import app
from pipelines.results import FAILED, OK


def run(*words: str | Path) -> int:
    return app([str(word) for word in words])


def tree(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("ray_session")
def test_a_damaged_store_of_two_segments_becomes_what_it_was(
    scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"

    def tokenize(corpus: str) -> int:
        options = ("--tokenizer", tokenizer_folder, "--out", out, "--shard-rows", "30", "--workers", "1")
        return run("tokenize", corpus, *options)

    assert (
        tokenize(scenes.replace("{000000..000002}", "{000000..000001}")) == OK
    )  # 200 rows: the last Zarr shard is ragged
    assert tokenize(scenes) == OK
    whole = tree(out)
    assert run("verify", out) == OK
    (out / "top/c/1/0/0").write_bytes(b"x")
    (out / "samples/part-000003.parquet").unlink()
    for shard in range(5, 10):  # rows from 150 on, before the second segment begins
        (out / f"commits/shard-{shard:06d}.json").unlink()
    assert run("verify", out) == FAILED
    assert run("repair", out) == FAILED
    assert tokenize(scenes) == OK
    assert tree(out) == whole
    assert run("repair", out) == OK
