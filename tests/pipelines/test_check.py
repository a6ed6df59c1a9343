"""The commands `verify` and `repair`: what they say, and how they end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cli import app
from vqmill.spec import LevelSpec

GOLDEN = Path(__file__).parents[1] / "vqmill/golden/v1/image.zarr"
COMMAND = ["vqmill", "tokenize", "my shards.tar", "--tokenizer", "runs/tok", "--out", "codes.zarr"]
QUOTED = "vqmill tokenize 'my shards.tar' --tokenizer runs/tok --out codes.zarr"
BROKEN = "bottom/c/1/0/0"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of a golden store (69 rows in Zarr shards of 32) with the record of the command that made it beside."""
    (tmp_path / "codes.zarr.run.json").write_text(json.dumps({"command": COMMAND}))
    return shutil.copytree(GOLDEN, tmp_path / "codes.zarr")


def run(*words: str | Path) -> int:
    return app([str(word) for word in words])


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What was said to people, and the JSON line."""
    *lines, last = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(last)


def damage(store: Path) -> None:
    data = (store / BROKEN).read_bytes()
    (store / BROKEN).write_bytes(data[:100] + b"x" + data[101:])


def quoted(store: Path) -> str:
    """The recorded command, for the store at the place where it is now."""
    return QUOTED.replace("--out codes.zarr", f"--out {store}")


def test_verify_says_that_all_is_well(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", store, "--json") == 3  # three samples are in quarantine
    text, facts = printed(capsys)
    assert "seen 74 = encoded 69 + quarantined 3 + skipped 2" in text
    assert "level bottom: 64x64 uint16, " in text
    assert "every checksum, code and row is right" in text
    assert (facts["problems"], facts["complete"], facts["rows"]) == ([], True, 69)
    assert run("verify", store, "--quick", "--json") == 3
    text, facts = printed(capsys)
    assert "metadata and sizes only" in text
    assert "every file is there with its size" in text
    assert facts["used_codes"] == {}


def test_verify_says_where_and_what_to_do(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(store)
    assert run("verify", store, "--json") == 1
    text, facts = printed(capsys)
    (problem,) = facts["problems"]
    where = "from input shards 1..2 (shard-000001.tar, shard-000002.tar)"
    assert f"PROBLEM {BROKEN} (level 'bottom', Zarr shard 1, rows 32..47, {where}): damaged: " in text
    assert "chunk 0 (rows 32..47) cannot be decoded" in text
    assert f"To make it again, run: vqmill repair {store}, then: {quoted(store)}" in text
    assert "1 problem" in text
    assert {name: problem[name] for name in ("kind", "file", "array", "shards", "rows", "input_shards", "sources")} == {
        "kind": "damaged", "file": BROKEN, "array": "bottom", "shards": [1, 1], "rows": [32, 47], "input_shards": [1, 2],
        "sources": ["shard-000001.tar", "shard-000002.tar"],
    }  # fmt: skip
    assert run("verify", store, "--quick") == 3, "its size is right"


def test_repair_says_what_it_does_and_what_comes_next(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(store)
    (store / "stray").write_bytes(b"x")
    assert run("repair", store, "--dry-run", "--json") == 1
    text, planned = printed(capsys)
    assert "would do: stray: removed" in text
    assert f"afterwards, run: {quoted(store)}" in text
    assert (store / "stray").exists()
    assert run("repair", store, "--json") == 1
    text, facts = printed(capsys)
    assert facts["done"] == planned["done"]
    assert facts["done"] == [
        "marked as unfinished",
        "zarr.json: written anew",
        "stray: removed",
        f"{BROKEN}: removed, to be made again",
    ]
    assert text.endswith(f"to finish the store, run: {quoted(store)}")
    assert facts["next"] == quoted(store)
    assert not (store / BROKEN).exists()
    assert run("verify", store, "--json") == 1
    assert "unfinished" in printed(capsys)[0]


def test_repair_ends_well_when_the_store_is_whole(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("repair", store) == 0
    assert "nothing to mend" in capsys.readouterr().out
    (store / "top/zarr.json").unlink()
    assert run("repair", store, "--dry-run") == 1
    assert run("repair", store) == 0
    assert capsys.readouterr().out.endswith("codes.zarr: whole\n")
    assert run("verify", store) == 3


def test_repair_says_what_it_cannot_mend(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "commits/shard-000001.json").unlink()
    assert run("repair", store, "--json") == 1
    text, facts = printed(capsys)
    assert (
        "REMAINS commits/shard-000001.json (Zarr shard 1): the commit record is missing. Restore it from a copy" in text
    )
    assert [problem["kind"] for problem in facts["remaining"]] == ["record"]


@pytest.mark.parametrize("record", [None, "", "[]", '{"command": [1]}'])
def test_without_a_record_the_command_is_named_in_words(
    store: Path, record: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = store.with_name("codes.zarr.run.json")
    place.unlink() if record is None else place.write_text(record)
    damage(store)
    assert run("verify", store) == 1
    assert "then: the `vqmill tokenize` command that made the store" in capsys.readouterr().out
    assert run("repair", store) == 1
    assert "run: the `vqmill tokenize` command that made the store" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_residual_stages_have_a_line_each(
    command: str, tmp_path: Path, stores: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = (LevelSpec("codes", 64, (2, 4, 3), outer="depth"),)
    spec = replace(stores.two_levels, levels=levels)
    codes = stores.codes(spec, 12)["codes"]
    codes[:, 1] //= 16
    path = stores.write(tmp_path / "codes.zarr", spec, {"codes": codes})
    assert run(command, path, "--json") == 3
    text, facts = printed(capsys)
    used = len(np.unique(codes[:, 0]))
    assert f"level codes stage 1: 4x3 uint8, {used} of 64 codes used" in text
    assert "level codes stage 2: 4x3 uint8, 4 of 64 codes used (6.2%), perplexity " in text
    assert facts["used_codes"] == {"codes/0": used, "codes/1": 4}
    assert facts["perplexity"].keys() == facts["used_codes"].keys()


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_what_is_no_store_is_a_wrong_use(command: str, tmp_path: Path) -> None:
    assert run(command, tmp_path / "nowhere.zarr") == 2
