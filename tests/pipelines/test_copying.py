"""Merged and sliced stores hold what their sources hold, count it once, and are the same bytes however often the copy was killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipelines.copying
import pipelines.selection
import vqmill
from pipelines.cli import app
from pipelines.copy_command import merge as merge_command
from pipelines.copy_command import slice_store
from pipelines.options import Codec
from pipelines.results import Result
from pipelines.tokenize_command import recorded_tokenizer, run_file
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError
from vqmill.layout import smallest_codec
from vqmill.spec import LevelSpec, StoreSpec
from vqmill.verify import verify_store
from vqmill.writer import StoreWriter

SPAN = 5  # rows of a span in these tests, so that small stores have many

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.selection, "SPAN_ROWS", SPAN)
    monkeypatch.setattr(pipelines.copying, "SPAN_ROWS", SPAN)


def merge(*stores: Path, out: Path, shard_rows: int | None = None, codec: Codec = "auto") -> Result:
    return merge_command(stores, out, shard_rows=shard_rows, codec=codec)


def cut(
    store: Path, out: Path, rows: str | None = None, labels: list[int] | None = None, shard_rows: int | None = None
) -> Result:
    return slice_store(store, out, rows=rows, labels=labels, shard_rows=shard_rows, codec="auto")


def renamed(stores: Any, prefix: str, rows_of_a_sample: int = 1) -> Any:
    """A builder whose sample keys begin otherwise, and whose samples may have several rows, as clips of a video have."""

    class Renamed(type(stores)):
        @staticmethod
        def samples(labels: list[int | None], first: int = 0) -> pa.Table:
            rows = stores.samples(labels, first).to_pylist()
            for row in rows:
                row["index"] //= rows_of_a_sample
                row["key"] = f"{prefix}-{row['index']}"
            return pa.Table.from_pylist(rows, schema=stores.samples([]).schema)

    return Renamed()


def make(
    stores: Any, path: Path, num_rows: int, *, spec: StoreSpec | None = None, seed: int = 0, prefix: str | None = None,
    unlabelled: bool = False,
) -> Path:  # fmt: skip
    """A finished store with labels 0, 1, 2, none, 0, 1, ... and one quarantined sample for each Zarr shard."""
    spec = spec or stores.two_levels
    labels = [None if unlabelled or row % 4 == 3 else row % 4 for row in range(num_rows)]
    return renamed(stores, prefix or path.stem).write(path, spec, stores.codes(spec, num_rows, seed), labels)


@pytest.fixture
def pair(stores: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two stores of 21 and 30 rows in Zarr shards of 8, with different keys."""
    return make(stores, tmp_path / "a.zarr", 21, seed=1), make(stores, tmp_path / "b.zarr", 30, seed=2)


def assert_holds(out: Path, parts: list[tuple[Path, Any]], *, quarantine: bool) -> None:
    """The store is whole, and holds these rows of these stores, one part behind the other."""
    codes = vqmill.open_codes(out)
    opened = [(vqmill.open_codes(path), rows) for path, rows in parts]
    assert verify_store(out).problems == ()
    for level in codes.levels:
        expected = np.concatenate([source[level][:][rows] for source, rows in opened])
        assert np.array_equal(codes[level][:], expected)
    assert np.array_equal(codes.labels, np.concatenate([source.labels[rows] for source, rows in opened]))
    lines = [line for source, rows in opened for line in np.array(source.samples().to_pylist())[rows].tolist()]
    assert codes.samples().to_pylist() == lines
    bad = [line for source, _ in opened for line in source.quarantine().to_pylist()] if quarantine else []
    assert codes.quarantine().to_pylist() == bad


def test_a_merge_is_its_sources_one_behind_the_other(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = merge(*pair, out=tmp_path / "c.zarr")
    assert_holds(tmp_path / "c.zarr", [(store, slice(None)) for store in pair], quarantine=True)
    assert (result.rows, result.counts) == (51, Counts(encoded=51, quarantined=3 + 4))
    assert result.facts["shared_keys"] == 0
    spec = vqmill.open_codes(tmp_path / "c.zarr").spec
    assert (spec.rows_per_shard, spec.codec, spec.num_commits) == (8, "blosc-zstd", 7)
    assert spec.corpus["num_samples"] == 58 == spec.segments[0].num_samples
    assert spec.corpus["class_names"] == ["cat", "dog"]
    assert spec.corpus["description"] == f"merge of {pair[0]}, {pair[1]}"
    assert spec.corpus["copied"] == [{"description": "made up", "rows": 21}, {"description": "made up", "rows": 30}]
    assert spec.segments[0].input_shards == 2


@pytest.mark.parametrize(
    ("rows", "labels", "wanted"),
    [
        ("3:17", None, range(3, 17)),
        ("24:", None, range(24, 30)),
        (":8", None, range(8)),
        (None, [1], range(1, 30, 4)),
        (None, [2, 0, 2], [row for row in range(30) if row % 4 in (0, 2)]),
        (None, [-1], range(3, 30, 4)),
        ("6:20", [1, -1], range(7, 20, 2)),
        ("6:20", [1, 99], [9, 13, 17]),
    ],
)
def test_a_slice_is_the_selection(
    pair: tuple[Path, Path], tmp_path: Path, rows: str | None, labels: list[int] | None, wanted: Any
) -> None:
    wanted = list(wanted)
    result = cut(pair[1], tmp_path / "c.zarr", rows, labels)
    assert_holds(tmp_path / "c.zarr", [(pair[1], wanted)], quarantine=False)
    assert (result.rows, result.counts) == (len(wanted), Counts(encoded=len(wanted)))
    description = vqmill.open_codes(tmp_path / "c.zarr").spec.corpus["description"]
    assert description.endswith(f" of {pair[1]}")
    assert all(f"label {label}: " in "\n".join(result.lines) for label in labels or ())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    shard_rows=st.integers(1, 12),
    of_a_sample=st.integers(1, 7),
    data=st.data(),
)
def test_merges_and_slices_of_anything(
    stores: Any,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    shard_rows: int,
    of_a_sample: int,
    data: Any,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sources = []
    for number, size in enumerate(sizes):
        labels = [row % 3 for row in range(size)]
        spec = replace(stores.two_levels, rows_per_shard=data.draw(st.integers(1, 9)))
        builder = renamed(stores, f"s{number}", of_a_sample)
        sources.append(builder.write(folder / f"{number}.zarr", spec, stores.codes(spec, size, number), labels))
    result = merge(*sources, out=folder / "all.zarr", shard_rows=shard_rows)
    assert_holds(folder / "all.zarr", [(source, slice(None)) for source in sources], quarantine=True)
    # The builder counts a sample for each row, so a row's sample is only known where it is read.
    assert result.counts.encoded == sum(sizes)
    first = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(first + 1, sum(sizes)))
    result = cut(folder / "all.zarr", folder / "part.zarr", f"{first}:{stop}")
    assert_holds(folder / "part.zarr", [(folder / "all.zarr", slice(first, stop))], quarantine=False)
    lines = vqmill.open_codes(folder / "part.zarr").samples().to_pylist()
    assert result.counts == Counts(encoded=len({(line["key"], line["index"]) for line in lines}))


def test_video_codes_one_level_and_other_shards_and_codec(stores: Any, tmp_path: Path) -> None:
    spec = replace(stores.two_levels, levels=(LevelSpec("codes", 70_000, (3, 2, 2)),), rows_per_shard=4)
    other = replace(spec, rows_per_shard=6, codec="zstd")
    one = make(stores, tmp_path / "one.zarr", 9, spec=spec)
    two = make(stores, tmp_path / "two.zarr", 13, spec=other, seed=5)
    merge(one, two, out=tmp_path / "auto.zarr")
    made = vqmill.open_codes(tmp_path / "auto.zarr").spec
    both = {"codes": np.concatenate([vqmill.open_codes(store)["codes"][:] for store in (one, two)])}
    assert (made.rows_per_shard, made.codec) == (4096, smallest_codec(made, both))
    merge(one, two, out=tmp_path / "chosen.zarr", shard_rows=5, codec="blosc-lz4")
    made = vqmill.open_codes(tmp_path / "chosen.zarr").spec
    assert (made.rows_per_shard, made.codec) == (5, "blosc-lz4")
    for name in ("auto.zarr", "chosen.zarr"):
        assert_holds(tmp_path / name, [(one, slice(None)), (two, slice(None))], quarantine=True)


def test_merging_merged_stores_is_merging_their_sources(pair: tuple[Path, Path], stores: Any, tmp_path: Path) -> None:
    third = make(stores, tmp_path / "d.zarr", 5, seed=3)
    merge(*pair, out=tmp_path / "two.zarr")
    again = merge(tmp_path / "two.zarr", third, out=tmp_path / "nested.zarr")
    flat = merge(*pair, third, out=tmp_path / "flat.zarr")
    assert again.counts == flat.counts
    nested, plain = (stores.files(tmp_path / name) for name in ("nested.zarr", "flat.zarr"))
    assert nested.keys() == plain.keys()
    different = {name for name in nested if nested[name] != plain[name] and not name.startswith("quarantine/")}
    assert {name.split("/")[0] for name in different} <= {"zarr.json", "commits"}, "rows and samples are the same bytes"
    assert_holds(tmp_path / "nested.zarr", [(tmp_path / "flat.zarr", slice(None))], quarantine=True)


def test_a_sample_that_stands_twice_in_a_row_is_counted_twice(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cut(pair[0], tmp_path / "one.zarr", "3:4")
    assert merge(tmp_path / "one.zarr", tmp_path / "one.zarr", out=tmp_path / "two.zarr").counts.encoded == 2
    assert merge(tmp_path / "two.zarr", out=tmp_path / "again.zarr").counts.encoded == 2


def killed_after(monkeypatch: pytest.MonkeyPatch, commits: int, job: Callable[[], object]) -> None:
    """Runs a job that stops right behind its n-th commit, or before its first."""
    real, left = StoreWriter.commit, [commits]

    def commit(self: StoreWriter, *arguments: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            job()


def test_a_copy_killed_at_any_commit_ends_as_an_uninterrupted_one(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: dict[str, Callable[[Path], Result]] = {
        "merge": lambda out: merge(*pair, out=out, shard_rows=7),
        "slice": lambda out: cut(pair[1], out, "2:29", [0, 2], 3),
    }
    for name, job in jobs.items():
        job(tmp_path / f"{name}.zarr")
        whole = stores.files(tmp_path / f"{name}.zarr")
        for commits in range(vqmill.open_codes(tmp_path / f"{name}.zarr").spec.num_commits):
            out = tmp_path / f"{name}-{commits}.zarr"
            killed_after(monkeypatch, commits, lambda job=job, out=out: job(out))
            assert not run_file(out).exists()
            with pytest.raises(CodesError, match="unfinished"):
                vqmill.open_codes(out)
            result = job(out)
            assert result.facts["resumed_rows"] == min(result.rows, commits * (7 if name == "merge" else 3))
            assert stores.files(out) == whole


def test_a_copy_killed_again_and_again(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(*pair, out=tmp_path / "whole.zarr", shard_rows=3)
    out = tmp_path / "c.zarr"
    for _ in range(8):
        killed_after(monkeypatch, 2, lambda: merge(*pair, out=out, shard_rows=3))
    merge(*pair, out=out, shard_rows=3)
    assert stores.files(out) == stores.files(tmp_path / "whole.zarr")
    before = stores.files(out)
    assert merge(*pair, out=out, shard_rows=3).facts["resumed_rows"] == 51
    assert stores.files(out) == before, "a finished copy is left alone"


@pytest.mark.parametrize("lost", [[0], [1, 2], [0, 4], [4]])
def test_lost_zarr_shards_of_an_unfinished_copy_are_made_again(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int]
) -> None:
    merge(*pair, out=tmp_path / "whole.zarr", shard_rows=7)
    out = tmp_path / "c.zarr"
    killed_after(monkeypatch, 5, lambda: merge(*pair, out=out, shard_rows=7))
    for shard in lost:
        (out / f"bottom/c/{shard}/0/0").unlink()
        (out / f"samples/part-{shard:06d}.parquet").unlink()
    result = merge(*pair, out=out, shard_rows=7)
    assert (result.facts["mended_shards"], result.facts["resumed_rows"]) == (lost, 35)
    assert f"Zarr shards {', '.join(map(str, lost))}" in "\n".join(result.lines)
    assert stores.files(out) == stores.files(tmp_path / "whole.zarr")


def test_a_process_that_dies(pair: tuple[Path, Path], stores: Any, tmp_path: Path) -> None:
    program = """if True:
        import os, sys
        from pathlib import Path
        from pipelines.copy_command import merge
        from vqmill.writer import StoreWriter

        real = StoreWriter.commit
        def commit(self, *arguments):
            real(self, *arguments)
            if len(self.commits) == 3:
                os._exit(9)
        StoreWriter.commit = commit
        merge([Path(path) for path in sys.argv[2:]], Path(sys.argv[1]), shard_rows=4, codec="auto")
    """
    out = tmp_path / "c.zarr"
    died = subprocess.run([sys.executable, "-c", program, str(out), *map(str, pair)], check=False)
    assert died.returncode == 9
    # That process had the real spans, so those that go on where it stopped need them, too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.selection, "SPAN_ROWS", 256)
        patch.setattr(pipelines.copying, "SPAN_ROWS", 256)
        merge(*pair, out=out, shard_rows=4)
        merge(*pair, out=tmp_path / "whole.zarr", shard_rows=4)
    assert stores.files(out) == stores.files(tmp_path / "whole.zarr")


def test_the_output_does_not_depend_on_the_number_of_threads(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 3):
        monkeypatch.setattr(pipelines.copying, "THREADS", number)
        merge(*pair, out=tmp_path / f"{number}.zarr", shard_rows=2)
    assert stores.files(tmp_path / "1.zarr") == stores.files(tmp_path / "3.zarr")


def test_no_more_zarr_shards_are_in_memory_than_there_are_threads(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lock, held, most = pipelines.copying._read_and_write, threading.Lock(), [0], [0]

    def read_and_write(*arguments: Any) -> Any:
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        try:
            written, rows = real(*arguments)
            assert rows <= 2
            return written, rows
        finally:
            with lock:
                held[0] -= 1

    monkeypatch.setattr(pipelines.copying, "_read_and_write", read_and_write)
    monkeypatch.setattr(pipelines.copying, "THREADS", 2)
    merge(*pair, out=tmp_path / "c.zarr", shard_rows=2)
    assert 1 <= most[0] <= 2


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
    stores: Any, pair: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    other = make(stores, tmp_path / "other.zarr", 9, spec=replace(stores.two_levels, **change))
    with pytest.raises(UsageError) as refused:
        merge(pair[0], other, out=tmp_path / "c.zarr")
    assert f"  {field}: {pair[0]} " in str(refused.value)
    assert f", {other} " in str(refused.value)
    assert not (tmp_path / "c.zarr").exists()


def test_a_store_without_class_names_comes_along_when_it_has_no_labels(
    stores: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = replace(stores.two_levels, corpus={"description": "unnamed"})
    other = make(stores, tmp_path / "other.zarr", 9, spec=spec, unlabelled=True)
    for number, order in enumerate(((pair[0], other), (other, pair[0]))):
        merge(*order, out=tmp_path / f"{number}.zarr")
        assert vqmill.open_codes(tmp_path / f"{number}.zarr").class_names == ("cat", "dog")


def test_what_was_computed_elsewhere_is_joined_and_skipped_files_are_added_up(stores: Any, tmp_path: Path) -> None:
    def spec(device: str, batch_size: int, skipped: dict[str, int]) -> StoreSpec:
        tokenizer = {**stores.two_levels.tokenizer, "computed_on": device, "batch_size": batch_size}
        corpus = {**stores.two_levels.corpus, "skipped": skipped}
        return replace(stores.two_levels, tokenizer=tokenizer, corpus=corpus)

    one = make(stores, tmp_path / "one.zarr", 3, spec=spec("cpu AVX2", 32, {"not_an_image": 2}))
    two = make(stores, tmp_path / "two.zarr", 3, spec=spec("cpu AVX512", 8, {"not_an_image": 1, "hidden": 4}))
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


def test_keys_that_several_sources_share_are_counted_and_said(stores: Any, tmp_path: Path) -> None:
    one = make(stores, tmp_path / "one.zarr", 9, prefix="x")
    two = make(stores, tmp_path / "two.zarr", 4, prefix="x", seed=1)
    result = merge(one, two, two, out=tmp_path / "c.zarr")
    assert result.facts["shared_keys"] == 4
    assert any("4 sample keys occur in more than one" in line for line in result.lines)


def test_facts_that_all_corpora_share_are_kept(stores: Any, tmp_path: Path) -> None:
    drawn = replace(stores.two_levels, corpus={"sampled": {"prior": "p", "label": None, "seed": 0}})
    one = make(stores, tmp_path / "one.zarr", 9, spec=drawn)
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


def test_sources_that_moved_are_the_same_sources(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(monkeypatch, 2, lambda: merge(*pair, out=tmp_path / "c.zarr"))
    moved = pair[0].rename(tmp_path / "moved.zarr")
    merge(moved, pair[1], out=tmp_path / "c.zarr")
    assert_holds(tmp_path / "c.zarr", [(moved, slice(None)), (pair[1], slice(None))], quarantine=True)


def test_unfinished_sources_are_refused(stores: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    part = stores.write(tmp_path / "part.zarr", stores.two_levels, stores.codes(stores.two_levels, 20), stop_after=1)
    with pytest.raises(CodesError, match="unfinished"):
        merge(pair[0], part, out=tmp_path / "c.zarr")


def test_a_source_that_changes_meanwhile_is_noticed(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StoreWriter.commit

    def commit(self: StoreWriter, *arguments: Any) -> None:
        stores.edit_json(
            pair[0] / "zarr.json", lambda value: value["attributes"]["vqmill"]["corpus"].update(num_samples=99)
        )
        real(self, *arguments)

    monkeypatch.setattr(StoreWriter, "commit", commit)
    with pytest.raises(CodesError, match="changed while it was copied"):
        merge(*pair, out=tmp_path / "c.zarr")
    assert not json.loads((tmp_path / "c.zarr" / "zarr.json").read_bytes())["attributes"]["vqmill"]["complete"]


@pytest.mark.parametrize("name", ["top/c/1/0/0", "samples/part-000001.parquet", "quarantine/part-000001.parquet"])
def test_damage_in_a_source_is_named_and_ends_the_copy(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    data = bytearray((pair[1] / name).read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    (pair[1] / name).write_bytes(data)
    with pytest.raises(CodesError, match=r"b\.zarr"):
        merge(*pair, out=tmp_path / "c.zarr")


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


def test_a_merge_of_nothing_is_refused(stores: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the stores"):
        merge(out=tmp_path / "c.zarr")
    empty = make(stores, tmp_path / "empty.zarr", 0)
    with pytest.raises(UsageError, match="no rows there"):
        merge(empty, empty, out=tmp_path / "c.zarr")
    full = make(stores, tmp_path / "full.zarr", 3)
    assert merge(empty, full, empty, out=tmp_path / "c.zarr").rows == 3
    with pytest.raises(UsageError, match="--shard-rows must be at least 1"):
        merge(full, out=tmp_path / "d.zarr", shard_rows=0)


def test_the_tokenizers_place_comes_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = merge(*pair, out=tmp_path / "unknown.zarr")
    assert "--tokenizer DIR" in result.lines[-1]
    with pytest.raises(UsageError, match="does not say where the tokenizer is"):
        recorded_tokenizer(tmp_path / "unknown.zarr")
    (tmp_path / "tok").mkdir()
    run_file(pair[1]).write_text(json.dumps({"tokenizer": "tok"}))
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


@pytest.mark.parametrize("command", ["merge", "slice"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, "--help")
    text = capsys.readouterr().out
    assert f"vqmill {command} " in text
    assert ".zarr --out " in text
