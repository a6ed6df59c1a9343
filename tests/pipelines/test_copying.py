"""Merged and sliced stores hold what their sources hold, count it once, and are the same bytes however often the copy was killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipelines.copying
import pipelines.selection
import vqmill
from pipelines.copy_command import merge as merge_command
from pipelines.copy_command import slice_store
from pipelines.options import Codec
from pipelines.results import Result
from pipelines.tokenize_command import run_file
from vqmill.commits import Counts
from vqmill.errors import CodesError
from vqmill.layout import smallest_codec
from vqmill.spec import LevelSpec
from vqmill.verify import verify_store
from vqmill.writer import StoreWriter

MakeStore = Callable[..., Path]
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
    make_store: MakeStore,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    shard_rows: int,
    of_a_sample: int,
    data: Any,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sources = []
    for number, size in enumerate(sizes):
        spec = replace(stores.two_levels, rows_per_shard=data.draw(st.integers(1, 9)))
        path = folder / f"{number}.zarr"
        sources.append(make_store(path, size, spec=spec, seed=number, rows_of_a_sample=of_a_sample))
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


def test_video_codes_one_level_and_other_shards_and_codec(stores: Any, make_store: MakeStore, tmp_path: Path) -> None:
    spec = replace(stores.two_levels, levels=(LevelSpec("codes", 70_000, (3, 2, 2)),), rows_per_shard=4)
    other = replace(spec, rows_per_shard=6, codec="zstd")
    one = make_store(tmp_path / "one.zarr", 9, spec=spec)
    two = make_store(tmp_path / "two.zarr", 13, spec=other, seed=5)
    merge(one, two, out=tmp_path / "auto.zarr")
    made = vqmill.open_codes(tmp_path / "auto.zarr").spec
    both = {"codes": np.concatenate([vqmill.open_codes(store)["codes"][:] for store in (one, two)])}
    assert (made.rows_per_shard, made.codec) == (4096, smallest_codec(made, both))
    merge(one, two, out=tmp_path / "chosen.zarr", shard_rows=5, codec="blosc-lz4")
    made = vqmill.open_codes(tmp_path / "chosen.zarr").spec
    assert (made.rows_per_shard, made.codec) == (5, "blosc-lz4")
    for name in ("auto.zarr", "chosen.zarr"):
        assert_holds(tmp_path / name, [(one, slice(None)), (two, slice(None))], quarantine=True)


def test_merging_merged_stores_is_merging_their_sources(
    pair: tuple[Path, Path], stores: Any, make_store: MakeStore, tmp_path: Path
) -> None:
    third = make_store(tmp_path / "d.zarr", 5, seed=3)
    merge(*pair, out=tmp_path / "two.zarr")
    again = merge(tmp_path / "two.zarr", third, out=tmp_path / "nested.zarr")
    flat = merge(*pair, third, out=tmp_path / "flat.zarr")
    assert again.counts == flat.counts
    nested, plain = (stores.files(tmp_path / name) for name in ("nested.zarr", "flat.zarr"))
    assert nested.keys() == plain.keys()
    different = {name for name in nested if nested[name] != plain[name] and not name.startswith("quarantine/")}
    assert {name.split("/")[0] for name in different} <= {"zarr.json", "commits"}, "rows and samples are the same bytes"
    assert_holds(tmp_path / "nested.zarr", [(tmp_path / "flat.zarr", slice(None))], quarantine=True)


def test_slices_put_together_again_are_the_same_files(pair: tuple[Path, Path], stores: Any, tmp_path: Path) -> None:
    for part in ("0:3", "3:19", "19:30"):
        cut(pair[1], tmp_path / f"{part[0]}.zarr", part)
    merge(*(tmp_path / f"{name}.zarr" for name in "031"), out=tmp_path / "again.zarr")
    before, after = stores.files(pair[1]), stores.files(tmp_path / "again.zarr")
    kept = [name for name in before if name.startswith(("top", "bottom", "label", "samples"))]
    assert len(kept) == 3 + 4 * 4
    assert all(before[name] == after[name] for name in kept)


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


def test_sources_that_moved_are_the_same_sources(
    pair: tuple[Path, Path], stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(monkeypatch, 2, lambda: merge(*pair, out=tmp_path / "c.zarr"))
    moved = pair[0].rename(tmp_path / "moved.zarr")
    merge(moved, pair[1], out=tmp_path / "c.zarr")
    assert_holds(tmp_path / "c.zarr", [(moved, slice(None)), (pair[1], slice(None))], quarantine=True)


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
