"""What goes together in a copy and what does not; what is said of the result; the commands `merge` and `slice`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vqmill
from pipelines.cli import app
from pipelines.copy_command import merge as merge_command
from pipelines.copy_command import slice_store
from pipelines.options import Codec
from pipelines.results import Result
from pipelines.tokenize_command import recorded_tokenizer, run_file
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError
from vqmill.spec import LevelSpec, StoreSpec

MakeStore = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("no_fsync")


def merge(*stores: Path, out: Path, shard_rows: int | None = None, codec: Codec = "auto") -> Result:
    return merge_command(stores, out, shard_rows=shard_rows, codec=codec)


def cut(
    store: Path, out: Path, rows: str | None = None, labels: list[int] | None = None, shard_rows: int | None = None
) -> Result:
    return slice_store(store, out, rows=rows, labels=labels, shard_rows=shard_rows, codec="auto")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokenizer": {"fingerprint": "1" * 32, "preset": "rgb32", "precision": "float32"}}, "tokenizer.fingerprint"),
        ({"tokenizer": {"fingerprint": "0" * 32, "preset": "grey28", "precision": "float32"}}, "tokenizer.preset"),
        ({"tokenizer": {"fingerprint": "0" * 32, "preset": "rgb32", "precision": "bf16"}}, "tokenizer.precision"),
        ({"preprocessing": {"size": 32, "crop": "none", "decoder": "none 1.0"}}, "preprocessing.crop"),
        ({"levels": (LevelSpec("top", 511, (2, 3)), LevelSpec("bottom", 200, (4, 6)))}, "levels.0.codebook_size"),
        ({"levels": (LevelSpec("top", 512, (2, 3)), LevelSpec("bottom", 200, (4, 5)))}, "levels.1.grid.1"),
        ({"levels": (LevelSpec("top", 512, (2, 3)),)}, "levels.1"),
        ({"corpus": {"class_names": ["cat", "fox"]}}, "class_names.1"),
        ({"corpus": {"class_names": []}}, "class_names"),
    ],
)
def test_stores_that_were_not_made_alike_are_refused(
    stores: Any, make_store: MakeStore, pair: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    other = make_store(tmp_path / "other.zarr", 9, spec=replace(stores.two_levels, **change))
    with pytest.raises(UsageError) as refused:
        merge(pair[0], other, out=tmp_path / "c.zarr")
    assert f"  {field}: {pair[0]} " in str(refused.value)
    assert f", {other} " in str(refused.value)
    assert not (tmp_path / "c.zarr").exists()


def test_a_store_without_class_names_comes_along_when_it_has_no_labels(
    stores: Any, make_store: MakeStore, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = replace(stores.two_levels, corpus={"description": "unnamed"})
    other = make_store(tmp_path / "other.zarr", 9, spec=spec, unlabelled=True)
    for number, order in enumerate(((pair[0], other), (other, pair[0]))):
        merge(*order, out=tmp_path / f"{number}.zarr")
        assert vqmill.open_codes(tmp_path / f"{number}.zarr").class_names == ("cat", "dog")


def test_what_was_computed_elsewhere_is_joined_and_skipped_files_are_added_up(
    stores: Any, make_store: MakeStore, tmp_path: Path
) -> None:
    def spec(device: str, batch_size: int, skipped: dict[str, int]) -> StoreSpec:
        tokenizer = {**stores.two_levels.tokenizer, "computed_on": device, "batch_size": batch_size}
        corpus = {**stores.two_levels.corpus, "skipped": skipped}
        return replace(stores.two_levels, tokenizer=tokenizer, corpus=corpus)

    one = make_store(tmp_path / "one.zarr", 3, spec=spec("cpu AVX2", 32, {"not_an_image": 2}))
    two = make_store(tmp_path / "two.zarr", 3, spec=spec("cpu AVX512", 8, {"not_an_image": 1, "hidden": 4}))
    result = merge(two, one, out=tmp_path / "both.zarr")
    again = merge(tmp_path / "both.zarr", one, out=tmp_path / "again.zarr")
    merge(one, one, out=tmp_path / "same.zarr")
    for name in ("both.zarr", "again.zarr"):
        made = vqmill.open_codes(tmp_path / name).spec
        assert made.tokenizer["computed_on"] == "cpu AVX2; cpu AVX512"
        assert made.tokenizer["batch_size"] == "8; 32"
    assert vqmill.open_codes(tmp_path / "both.zarr").spec.corpus["skipped"] == {"not_an_image": 3, "hidden": 4}
    assert vqmill.open_codes(tmp_path / "same.zarr").spec.tokenizer["batch_size"] == 32
    assert result.counts == Counts(encoded=6, quarantined=2, skipped=7)
    assert again.counts == Counts(encoded=9, quarantined=3, skipped=9)
    cut(tmp_path / "both.zarr", tmp_path / "part.zarr", "0:3")
    assert vqmill.open_codes(tmp_path / "part.zarr").spec.corpus["skipped"] == {}


def test_keys_that_several_sources_share_are_counted_and_said(make_store: MakeStore, tmp_path: Path) -> None:
    one = make_store(tmp_path / "one.zarr", 9, prefix="x")
    two = make_store(tmp_path / "two.zarr", 4, prefix="x", seed=1)
    result = merge(one, two, two, out=tmp_path / "c.zarr")
    assert result.facts["shared_keys"] == 4
    assert any("4 sample keys occur in more than one" in line for line in result.lines)


def test_facts_that_all_corpora_share_are_kept(stores: Any, make_store: MakeStore, tmp_path: Path) -> None:
    drawn = replace(stores.two_levels, corpus={"sampled": {"prior": "p", "label": None, "seed": 0}})
    one = make_store(tmp_path / "one.zarr", 9, spec=drawn)
    cut(one, tmp_path / "part.zarr", "1:3")
    assert vqmill.open_codes(tmp_path / "part.zarr").spec.corpus["sampled"] == drawn.corpus["sampled"]


def test_places_that_are_read_are_not_written(pair: tuple[Path, Path], stores: Any, tmp_path: Path) -> None:
    before = stores.files(tmp_path)
    (tmp_path / "link.zarr").symlink_to(pair[0])
    for out in (pair[0], pair[1], pair[1] / "inside.zarr", tmp_path, tmp_path / "link.zarr"):
        with pytest.raises(UsageError, match="Choose a place outside"):
            merge(*pair, out=out)
    with pytest.raises(UsageError, match="Choose a place outside"):
        cut(pair[0], pair[0], "0:3")
    assert stores.files(tmp_path) == before


def test_an_output_of_another_copy_is_refused(pair: tuple[Path, Path], stores: Any, tmp_path: Path) -> None:
    merge(*pair, out=tmp_path / "c.zarr")
    before = stores.files(tmp_path / "c.zarr")
    with pytest.raises(UsageError, match="plan: there"):
        merge(*reversed(pair), out=tmp_path / "c.zarr")
    with pytest.raises(UsageError, match="rows_per_shard: there 8, now 4"):
        merge(*pair, out=tmp_path / "c.zarr", shard_rows=4)
    with pytest.raises(UsageError, match="codec: there"):
        merge(*pair, out=tmp_path / "c.zarr", codec="zstd")
    with pytest.raises(UsageError, match="plan: there"):
        cut(pair[1], tmp_path / "c.zarr", "0:20", shard_rows=8)
    assert stores.files(tmp_path / "c.zarr") == before


def test_unfinished_sources_are_refused(stores: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    part = stores.write(tmp_path / "part.zarr", stores.two_levels, stores.codes(stores.two_levels, 20), stop_after=1)
    with pytest.raises(CodesError, match="unfinished"):
        merge(pair[0], part, out=tmp_path / "c.zarr")


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (None, None, "say which rows"),
        (None, [], "say which rows"),
        ("5:5", None, "no rows there"),
        ("7:3", None, "no rows there"),
        ("100:", None, "no rows there; the store has rows 0:21"),
        ("all", None, "expected START:STOP"),
        (None, [99], "no rows with label 99 there"),
        ("0:3", [-1, 9], "no rows 0:3 with label -1 or 9 there"),
        (None, [-2], "expected a class number"),
    ],
)
def test_selections_without_rows_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, rows: str | None, labels: list[int] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cut(pair[0], tmp_path / "c.zarr", rows, labels)
    assert not (tmp_path / "c.zarr").exists()


def test_a_merge_of_nothing_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the stores"):
        merge(out=tmp_path / "c.zarr")
    empty = make_store(tmp_path / "empty.zarr", 0)
    with pytest.raises(UsageError, match="no rows there"):
        merge(empty, empty, out=tmp_path / "c.zarr")
    full = make_store(tmp_path / "full.zarr", 3)
    assert merge(empty, full, empty, out=tmp_path / "c.zarr").rows == 3
    with pytest.raises(UsageError, match="--shard-rows must be at least 1"):
        merge(full, out=tmp_path / "d.zarr", shard_rows=0)


def test_the_tokenizers_place_comes_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = merge(*pair, out=tmp_path / "unknown.zarr")
    assert "--tokenizer DIR" in result.lines[-1]
    with pytest.raises(UsageError, match="does not say where the tokenizer is"):
        recorded_tokenizer(tmp_path / "unknown.zarr")
    (tmp_path / "tok").mkdir()
    run_file(pair[1]).write(json.dumps({"tokenizer": "tok"}).encode())
    (tmp_path / "deep").mkdir()
    merge(*pair, out=tmp_path / "deep" / "c.zarr")
    assert recorded_tokenizer(tmp_path / "deep" / "c.zarr").resolve() == tmp_path / "tok"
    record = json.loads(run_file(tmp_path / "deep" / "c.zarr").read_bytes())
    assert (record["sources"], record["rows"], record["counts"]["quarantined"]) == (["../a.zarr", "../b.zarr"], 51, 7)


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def test_the_commands(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def report() -> dict[str, Any]:
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    out, part = tmp_path / "c.zarr", tmp_path / "part.zarr"
    assert run("merge", *pair, "--out", out, "--shard-rows", "16", "--codec", "zstd", "--json") == 3
    merged = report()
    assert [merged[name] for name in ("seen", "encoded", "quarantined", "skipped", "rows")] == [58, 51, 7, 0, 51]
    assert run("verify", out, "--json") == 3
    verified = report()
    assert all(verified[name] == merged[name] for name in ("seen", "encoded", "quarantined", "skipped", "rows"))
    assert vqmill.open_codes(out).spec.codec == "zstd"
    assert run("slice", out, "--out", part, "--rows", "10:40", "--label", "1", "--label", "-1", "--json") == 0
    sliced = report()
    assert sliced["seen"] == sliced["rows"] == vqmill.open_codes(part).spec.num_rows
    assert sum(sliced["labels"].values()) == sliced["rows"]
    assert run("verify", part) == 0
    assert run("inspect", part) == 0
    assert "rows 10:40 with label -1 or 1 of" in capsys.readouterr().out
    shutil.rmtree(part)
    assert run("slice", out, "--out", part) == 2
    assert run("merge", pair[0], tmp_path / "nowhere.zarr", "--out", part) == 2
    assert run("slice", out, "--out", part, "--rows", "99:") == 2
    assert not part.exists()
