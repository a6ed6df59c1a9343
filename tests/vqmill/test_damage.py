"""Damage is located: kind, array, Zarr shard, rows, input shards, and what to do; and one problem never hides another."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from vqmill import CodesError, LevelSpec, StoreSpec
from vqmill import spec as spec_module
from vqmill import verify as verify_module
from vqmill.layout import encode_zarr_shard
from vqmill.problems import Problem, runs, whole_commits
from vqmill.repair import repair_store
from vqmill.spec import Segment
from vqmill.usage import MOST_STAGES, CodeUsage, perplexity
from vqmill.verify import shard_of, verify_store


@pytest.fixture
def fine_chunks(monkeypatch):
    """Chunks of two rows of `top` and one of `bottom`."""
    monkeypatch.setattr(spec_module, "CHUNK_BYTES", 24)


@pytest.fixture
def chunked(tmp_path, stores, fine_chunks):
    spec = stores.two_levels
    return stores.write(tmp_path / "chunked.zarr", spec, stores.codes(spec, 21), list(range(21)))


def flip_in_chunk(path, chunk, num_chunks):
    """Flips a byte in the middle of one chunk of a Zarr shard."""
    data = bytearray(path.read_bytes())
    index = np.frombuffer(bytes(data[-(16 * num_chunks + 4) : -4]), "<u8").reshape(-1, 2)
    start, size = index[chunk].tolist()
    data[start + size // 2] ^= 1
    path.write_bytes(data)


def kinds(store, **options):
    return [(problem.kind, problem.file) for problem in verify_store(store, **options).problems]


def test_a_broken_chunk_is_named_with_its_rows(chunked):
    flip_in_chunk(chunked / "top/c/1/0/0", 2, 4)
    (problem,) = verify_store(chunked).problems
    assert (problem.kind, problem.array, problem.shards, problem.rows) == ("damaged", "top", (1, 1), (12, 13))
    assert (problem.input_shards, problem.sources) == ((1, 1), ("shard-é.tar",))
    assert str(problem).startswith(
        "top/c/1/0/0 (level 'top', Zarr shard 1, rows 12..13, from input shard 1 (shard-é.tar)): "
    )
    assert "its SHA-256 is not the recorded one; chunk 2 (rows 12..13) cannot be decoded: damaged: its CRC" in str(
        problem
    )


@pytest.mark.parametrize("array", ["top/c/{}/0/0", "label/c/{}"])
def test_the_file_of_another_zarr_shard_is_one_problem(chunked, array):
    shutil.copy(chunked / array.format(0), chunked / array.format(1))
    (problem,) = verify_store(chunked).problems
    assert (problem.kind, problem.rows) == ("damaged", (8, 15))
    assert "all its chunks can be decoded" in str(problem)


def test_broken_chunks_with_a_matching_record_are_content(chunked, stores):
    for chunk in (0, 1, 4):
        flip_in_chunk(chunked / "bottom/c/2/0/0", chunk, 8)
    stores.recommit(chunked, 2, "bottom/c/2/0/0")
    (problem,) = verify_store(chunked).problems
    assert (problem.kind, problem.rows) == ("content", (16, 20))
    assert "chunks 0..1 (rows 16..17), chunk 4 (row 20) cannot be decoded" in str(problem)


def test_a_record_in_the_middle_does_not_hide_what_lies_behind(store):
    (store / "commits/shard-000001.json").unlink()
    (store / "bottom/c/2/0/0").write_bytes(b"x")
    (store / "label/zarr.json").write_bytes(b"[" * 100_000)
    (store / "stray").write_bytes(b"x")
    assert sorted(kinds(store)) == [
        ("damaged", "bottom/c/2/0/0"),
        ("leftover", "stray"),
        ("metadata", "label/zarr.json"),
        ("record", "commits/shard-000001.json"),
    ]


def test_missing_records_in_a_row_are_one_problem(store):
    for shard in (1, 2):
        (store / f"commits/shard-{shard:06d}.json").unlink()
    (problem,) = verify_store(store).problems
    assert (problem.kind, problem.shards) == ("record", (1, 2))


def test_a_store_that_claims_a_billion_commits_is_looked_at_quickly(tmp_path, stores):
    spec = StoreSpec((LevelSpec("codes", 16, (2, 2)),), 4, {}, num_rows=4 * 10**9, num_commits=10**9, complete=True)
    path = stores.write(tmp_path / "codes.zarr", replace(spec, num_rows=0, num_commits=0), stores.codes(spec, 4))
    stores.edit_json(
        path / "zarr.json",
        lambda group: group["attributes"]["vqmill"].update(num_rows=4 * 10**9, num_commits=10**9, complete=True),
    )
    found = verify_store(path).problems
    assert [problem.shards for problem in found if problem.kind == "record"] == [(1, 10**9 - 1)]


@pytest.mark.parametrize("quick", [False, True])
def test_a_whole_store_has_no_problem(store, quick):
    assert kinds(store, quick=quick) == []


def test_quick_sees_files_and_sizes_but_not_bytes(store):
    assert verify_store(store, quick=True).bytes_read == 0
    data = bytearray((store / "top/c/0/0/0").read_bytes())
    data[4] ^= 1
    (store / "top/c/0/0/0").write_bytes(data)
    assert kinds(store, quick=True) == []
    (store / "top/c/1/0/0").unlink()
    (store / "label/c/2").write_bytes(b"x")
    (store / "top/c/7/0").mkdir(parents=True)
    (store / "top/c/7/0/0").write_bytes(b"x")
    assert kinds(store, quick=True) == [
        ("damaged", "top/c/1/0/0"),
        ("damaged", "label/c/2"),
        ("leftover", "top/c/7/0/0"),
    ]


def test_what_a_job_is_about_to_commit_is_no_damage(tmp_path, stores):
    spec = stores.two_levels
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21), stop_after=2)
    for name in ("top/c/2/0/0", "samples/part-000005.parquet", "commits/shard-000002.json", "label/c/2.ab.partial"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    stores.edit_json(path / "top/zarr.json", lambda array: array.update(shape=[24, 2, 3]))
    found = verify_store(path)
    assert found.damage == ()
    assert [problem.kind for problem in found.problems] == ["pending"] * 4 + ["unfinished"]
    (path / "top/c/0/0/0.old").write_bytes(b"x")
    assert [problem.file for problem in verify_store(path).damage] == ["top/c/0/0/0.old"]


@pytest.fixture
def growing(tmp_path, stores):
    """A store whose last Zarr shard (5 rows) is being opened again, and the files and the record that will take the place of its own."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 24)
    old = stores.write(tmp_path / "codes.zarr", spec, {name: rows[:21] for name, rows in codes.items()})
    stores.edit_json(old / "zarr.json", lambda group: group["attributes"]["vqmill"].update(complete=False))
    new = stores.write(tmp_path / "new.zarr", spec, codes)
    names = ["top/c/2/0/0", "bottom/c/2/0/0", "label/c/2", "samples/part-000002.parquet", "commits/shard-000002.json"]
    return old, {name: (new / name).read_bytes() for name in names}


@pytest.mark.parametrize("quick", [False, True])
def test_a_last_zarr_shard_that_is_opened_again_is_no_damage(growing, stores, quick):
    store, new = growing
    for name, data in new.items():
        (store / name).write_bytes(data)
        found = verify_store(store, quick=quick)
        assert found.damage == (), name
        assert {problem.kind for problem in found.problems} <= {"reopened", "unfinished"}
    assert [problem.kind for problem in verify_store(store).problems] == ["unfinished"]
    assert repair_store(store).done == ()
    assert stores.files(store).items() >= new.items()


@pytest.mark.parametrize("name", ["bottom/c/2/0/0", "samples/part-000002.parquet"])
def test_damage_in_a_last_zarr_shard_that_is_opened_again_is_found(growing, name):
    store, new = growing
    (store / "top/c/2/0/0").write_bytes(new["top/c/2/0/0"])
    (store / name).write_bytes(new[name][:-20])
    found = verify_store(store).problems
    assert [(problem.kind, problem.file) for problem in found] == [
        ("reopened", "top/c/2/0/0"), ("damaged", name), ("unfinished", "zarr.json"),
    ]  # fmt: skip


def test_advice_names_the_commands(store):
    (store / "top/c/1/0/0").unlink()
    (problem,) = verify_store(store, again="vqmill tokenize 'my shards.tar' --out codes.zarr").problems
    assert str(problem).endswith(
        f"To make it again, run: vqmill repair {store}, then: vqmill tokenize 'my shards.tar' --out codes.zarr"
    )
    (store / "commits/shard-000000.json").unlink()
    assert {problem.advice for problem in verify_store(store).problems} == {
        "Restore it from a copy, or make the store again at another place: the `vqmill tokenize` command that made the store"
    }


@pytest.mark.parametrize("folder", ["bottom", "commits", "samples"])
def test_a_link_is_a_problem_and_is_not_followed(store, tmp_path, folder):
    (store / folder).rename(tmp_path / "elsewhere")
    (store / folder).symlink_to(tmp_path / "elsewhere")
    found = verify_store(store).problems
    assert ("link", folder) in [(problem.kind, problem.file) for problem in found]
    assert "cp -rL" in str(found[0])


def test_a_pipe_is_not_waited_for(store):
    (store / "top/c/0/0/0").unlink()
    os.mkfifo(store / "top/c/0/0/0")
    (problem,) = verify_store(store).problems
    assert "not a plain file" in str(problem)


def test_cursors_that_go_back_are_found(store, stores):
    def change(record):
        record["cursor"]["input_shard"] = 0

    stores.edit_json(store / "commits/shard-000001.json", change)
    (problem,) = verify_store(store).problems
    assert problem.kind == "record"
    assert "(0, 0, 0) lies before the (1, 0, 0)" in str(problem)


FIRST = Segment("a", 0, 0, 2, 17)


@pytest.mark.parametrize(
    ("segments", "good"),
    [
        ((), True),
        ((Segment("a"),), True),
        ((FIRST, Segment("b", 13, 1, 3, 24)), True),
        ((FIRST, Segment("b", 16, 2, 3, 24)), True),
        ((Segment("a", 0, 0, 3, 25),), False),
        ((Segment("a", 1, 0, 3, 24),), False),
        ((FIRST, Segment("b", 13, 0, 3, 24)), False),
        ((FIRST, Segment("b", 13, 2, 3, 24)), False),
        ((FIRST, Segment("b", 22, 2, 3, 24)), False),
        ((Segment("a", 0, 0, 4, 17), Segment("b", 13, 1, 3, 24)), False),
    ],
)
def test_segments_follow_each_other_and_count_the_plan(tmp_path, stores, segments, good):
    spec = replace(stores.two_levels, segments=segments)
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21))
    assert kinds(path) == ([] if good else [("counts", "zarr.json")])


def test_keys_that_later_writers_add_are_no_problem(store, stores):
    stores.edit_json(store / "zarr.json", lambda group: group["attributes"]["vqmill"].update(later=[1]))
    assert kinds(store) == []
    stores.edit_json(store / "zarr.json", lambda group: group["attributes"].update(later=[1]))
    assert kinds(store) == [("metadata", "zarr.json")]


def test_the_order_of_findings_does_not_depend_on_threads(store, monkeypatch):
    for name in ("top/c/0/0/0", "bottom/c/1/0/0", "samples/part-000002.parquet"):
        (store / name).write_bytes(b"x")
    many = verify_store(store)
    monkeypatch.setattr(verify_module, "THREADS", 1)
    assert verify_store(store) == many


def test_a_codebook_of_four_billion_takes_no_memory(tmp_path, stores):
    spec = StoreSpec((LevelSpec("codes", 2**32 - 1, (3,)),), 4, {})
    codes = {"codes": np.array([[0, 7, 2**32 - 2], [7, 7, 9]])}
    path = stores.write(tmp_path / "codes.zarr", spec, codes)
    found = verify_store(path)
    assert (found.problems, found.used_codes) == ((), {"codes": 4})
    assert found.perplexity["codes"] == pytest.approx(perplexity(np.array([1, 3, 1, 1])))


@pytest.mark.parametrize(("stages", "names"), [(1, 1), (MOST_STAGES, MOST_STAGES), (MOST_STAGES + 1, 0)])
def test_residual_stages_are_counted_each_by_itself(tmp_path, stores, stages, names):
    spec = StoreSpec((LevelSpec("codes", 300, (stages, 2, 1), outer="depth"), LevelSpec("clip", 9, (2, 2, 2))), 2, {})
    codes = stores.codes(spec, 5)
    codes["codes"] = codes["codes"] // (1 + np.arange(stages)[:, None, None])  # each stage uses fewer
    found = verify_store(stores.write(tmp_path / "codes.zarr", spec, codes))
    assert found.problems == ()
    expected = {f"codes/{stage}": codes["codes"][:, stage] for stage in range(names)} or {"codes": codes["codes"]}
    expected["clip"] = codes["clip"]
    assert found.used_codes == {name: len(np.unique(part)) for name, part in expected.items()}
    assert found.perplexity == pytest.approx({name: perplexity(np.bincount(part.ravel())) for name, part in expected.items()})  # fmt: skip


@pytest.mark.parametrize("size", [5, 70_000])
def test_usage_adds_up(size):
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 5, (6, 2, 3)).astype(np.uint32)
    whole, left, right = CodeUsage(size), CodeUsage(size), CodeUsage(size)
    whole.add(codes)
    left.add(codes[:2])
    right.add(codes[2:])
    left.merge(right)
    expected = np.bincount(codes.reshape(-1))
    assert (left.used, left.perplexity) == (whole.used, whole.perplexity)
    assert whole.used == np.count_nonzero(expected)
    assert whole.perplexity == pytest.approx(perplexity(expected))


def test_names_of_files_give_their_zarr_shard(stores):
    spec = stores.two_levels
    names = {
        "top/c/3/0/0": 3,
        "label/c/12": 12,
        "samples/part-000007.parquet": 7,
        "commits/shard-1000000.json": 1_000_000,
    }
    assert {name: shard_of(spec, name) for name in names} == names
    for name in ("top/c/3/0", "top/c/03/0/0", "samples/part-7.parquet", "zarr.json", "../top/c/1/0/0", "top/zarr.json"):
        assert shard_of(spec, name) is None


def test_numbers_become_ranges():
    assert runs([]) == []
    assert runs([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 7), (9, 10)]


@pytest.mark.parametrize(
    ("lost", "whole"),
    [([], 5), ([(4, 4)], 4), ([(2, 4)], 2), ([(1, 1)], 5), ([(1, 1), (3, 3), (4, 4)], 3), ([(0, 4)], 0)],
)
def test_a_lost_tail_ends_at_the_last_whole_commit(lost, whole):
    problems = [Problem("record", "", "", shards=shards) for shards in lost]
    assert whole_commits(5, problems) == whole
    assert whole_commits(5, [replace(problem, kind="damaged") for problem in problems]) == 5


def test_problems_are_json(store):
    shutil.rmtree(store / "commits")
    (problem,) = verify_store(store).problems
    record = json.loads(json.dumps(problem.to_json()))
    assert record["shards"] == [0, 2]
    assert record["message"] == str(problem)
    assert record["kind"] == "record"


def test_a_group_that_is_damaged_itself_says_nothing_else(store):
    (store / "zarr.json").write_bytes(b"{")
    with pytest.raises(CodesError, match="Restore it from a copy"):
        verify_store(store)


def test_codes_beyond_the_codebook_are_named_by_their_row(chunked, stores):
    rows = stores.codes(stores.two_levels, 21)["top"][8:16]
    rows[3, 1, 2], rows[6, 0, 0] = 512, 600
    wide = LevelSpec("top", 65_535, (2, 3))
    (chunked / "top/c/1/0/0").write_bytes(encode_zarr_shard(replace(stores.two_levels, levels=(wide,)), wide, rows))
    stores.recommit(chunked, 1, "top/c/1/0/0")
    (problem,) = verify_store(chunked).problems
    assert problem.rows == (11, 14)
    assert "holds code 512 at row 11, but codebook_size is 512 (valid 0..511); 2 rows hold such codes" in str(problem)
