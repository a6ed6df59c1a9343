"""`repair_store`: what it mends, what it leaves alone, and that a kill at any moment costs nothing."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import vqmill
from vqmill import CodesError
from vqmill import places as places_module
from vqmill.errors import UsageError
from vqmill.files import hold_lock
from vqmill.layout import commit_file, read_spec, shard_files
from vqmill.problems import Problem
from vqmill.repair import plan_repair, repair_store
from vqmill.spec import Segment
from vqmill.verify import verify_store
from vqmill.writer import Commit, write_shard

LABELS = [None if row % 5 == 4 else row for row in range(21)]


def finish(stores, store):
    """What `tokenize` does next: makes missing files of committed Zarr shards again, then goes on behind the last commit."""
    spec, codes = read_spec(store), stores.codes(stores.two_levels, 21)
    for shard in range(spec.num_commits):
        recorded = Commit.read(store, commit_file(shard)).files
        if not all((store / name).is_file() for name in recorded):
            rows = slice(8 * shard, min(21, 8 * shard + 8))
            samples = stores.samples(LABELS[rows], rows.start)
            levels = {name: values[rows] for name, values in codes.items()}
            assert write_shard(store, spec, shard, levels, samples, stores.quarantine(shard)) == recorded
    stores.write(store, replace(spec, complete=False), codes, LABELS)


@pytest.fixture
def whole(finished_store, stores):
    """The files of the store that every repaired one becomes again."""
    return stores.files(finished_store)


def test_nothing_is_done_to_a_whole_store(store, stores, whole):
    made = repair_store(store)
    assert (made.done, made.remaining, made.complete) == ((), (), True)
    assert stores.files(store) == whole


def test_leftovers_are_removed(store, stores, whole):
    (store / "top/c/0/0/0.ab.partial").write_bytes(b"x")
    (store / "notes").mkdir()
    (store / "notes/stray").write_bytes(b"x")
    made = repair_store(store)
    assert made.done == ("notes/stray: removed", "top/c/0/0/0.ab.partial: removed")
    assert (made.remaining, made.complete) == ((), True)
    assert stores.files(store) == whole


@pytest.mark.parametrize("name", ["top/zarr.json", "label/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
def test_metadata_of_arrays_is_written_anew(store, stores, whole, name, content):
    (store / name).unlink() if content is None else (store / name).write_bytes(content)
    made = repair_store(store)
    assert made.done == (f"{name}: written anew",)
    assert made.complete
    assert stores.files(store) == whole


def test_a_group_with_other_attributes_is_written_anew(store, stores, whole):
    stores.edit_json(store / "zarr.json", lambda group: group["attributes"].update(note="mine"))
    assert repair_store(store).done == ("zarr.json: written anew",)
    assert stores.files(store) == whole


@pytest.mark.parametrize("missing", [False, True])
def test_damaged_files_are_removed_and_made_again(store, stores, whole, missing):
    for name in ("top/c/0/0/0", "samples/part-000001.parquet"):
        (store / name).unlink() if missing else (store / name).write_bytes(b"x")
    made = repair_store(store)
    assert made.done[0] == "marked as unfinished"
    assert (made.remaining, made.complete) == ((), False)
    expected = {name for name in whole if name not in ("top/c/0/0/0", "samples/part-000001.parquet")}
    assert stores.files(store).keys() == expected
    with pytest.raises(CodesError, match="unfinished"):
        vqmill.open_codes(store)
    finish(stores, store)
    assert stores.files(store) == whole
    assert repair_store(store).done == ()


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("how", ["missing", "damaged", "content"])
def test_a_lost_tail_is_given_up_and_made_again(store, stores, whole, lost, how):
    for shard in range(lost, 3):
        path = store / commit_file(shard)
        if how == "missing":
            path.unlink()
        elif how == "damaged":
            path.write_bytes(path.read_bytes()[:-9])
        else:
            (store / f"samples/part-{shard:06d}.parquet").write_bytes(b"PAR1 nothing PAR1")
            stores.recommit(store, shard, f"samples/part-{shard:06d}.parquet")
    (store / "top/c/0/0/0").write_bytes(b"x")
    made = repair_store(store)
    given_up = f"back to {lost} Zarr shards: Zarr shard{'s 1..2 (13' if lost == 1 else ' 2 (5'} rows, "
    assert made.done[0].startswith(given_up)
    assert (made.remaining, made.complete) == ((), False)
    spec = read_spec(store)
    assert (spec.num_rows, spec.num_commits, spec.complete) == (8 * lost, lost, False)
    left = {name for shard in range(lost) for name in [*shard_files(spec, shard, 8), commit_file(shard)]}
    assert stores.files(store).keys() == left - {"top/c/0/0/0"} | {name for name in whole if name.endswith("zarr.json")}
    missing, unfinished = verify_store(store).problems
    assert (missing.kind, missing.wrong, unfinished.kind) == ("damaged", "missing", "unfinished")
    assert missing.advice == "To make it again, run: the `vqmill tokenize` command that made the store"
    finish(stores, store)
    assert stores.files(store) == whole


def test_segments_stay(tmp_path, stores):
    segments = (Segment("a", 0, 0, 2, 18), Segment("b", 16, 2, 3, 24))
    spec = replace(stores.two_levels, segments=segments)
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21))
    before = stores.files(path)
    (path / commit_file(1)).unlink()
    (path / commit_file(2)).unlink()
    repair_store(path)
    assert read_spec(path).segments == segments
    assert [problem.kind for problem in verify_store(path).problems] == ["unfinished"]
    stores.write(path, spec, stores.codes(spec, 21))
    assert stores.files(path) == before


def test_a_lost_record_in_the_middle_stops_everything_but_the_safe(store, stores):
    (store / commit_file(1)).unlink()
    (store / "top/c/2/0/0").write_bytes(b"x")
    (store / "stray").write_bytes(b"x")
    before = stores.files(store)
    made = repair_store(store)
    assert made.done == ("stray: removed",)
    assert [problem.kind for problem in made.remaining] == ["record", "damaged"]
    assert made.complete
    assert stores.files(store) == {name: data for name, data in before.items() if name != "stray"}


def test_wrong_content_in_the_middle_remains_and_the_rest_is_mended(store, stores):
    (store / "quarantine/part-000001.parquet").write_bytes(b"x")
    stores.recommit(store, 1, "quarantine/part-000001.parquet")
    (store / "top/c/0/0/0").write_bytes(b"x")
    made = repair_store(store)
    assert [problem.file for problem in made.remaining] == ["quarantine/part-000001.parquet"]
    assert not made.complete
    assert not (store / "top/c/0/0/0").exists()
    assert (store / "quarantine/part-000001.parquet").read_bytes() == b"x"


def test_with_no_whole_record_nothing_is_given_up(store, stores):
    shutil.rmtree(store / "commits")
    before = stores.files(store)
    made = repair_store(store)
    assert (made.done, [problem.kind for problem in made.remaining]) == ((), ["record"])
    assert stores.files(store) == before


def test_a_copy_can_be_made_again_like_any_other(tmp_path, stores):
    spec = replace(stores.two_levels, corpus={**stores.two_levels.corpus, "sampled": {}, "copied": [{"rows": 21}]})
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21))
    (path / "top/c/0/0/0").unlink()
    (problem,) = verify_store(path).problems
    assert problem.input_shards is None, "its cursors count stores"
    assert problem.sources == ("shard-é.tar",)
    assert problem.advice.endswith("then: the `vqmill` command that made the store")
    assert not repair_store(path).complete


def test_a_store_that_a_prior_drew_keeps_its_damaged_files(tmp_path, stores):
    spec = replace(stores.two_levels, corpus={"sampled": {"prior": "p"}})
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21))
    (path / commit_file(2)).unlink()
    (path / "top/c/0/0/0").write_bytes(b"x")
    before = stores.files(path)
    made = repair_store(path)
    assert (made.done, len(made.remaining), made.complete) == ((), 2, True)
    assert stores.files(path) == before


def test_links_are_left_alone_and_nothing_behind_them_is_written(store, stores, tmp_path):
    (store / "top").rename(tmp_path / "elsewhere")
    (store / "top").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/zarr.json").write_bytes(b"{}")
    (tmp_path / "elsewhere/c/1/0/0").write_bytes(b"x")
    (tmp_path / "elsewhere/stray").write_bytes(b"x")
    before = stores.files(tmp_path / "elsewhere")
    made = repair_store(store)
    assert made.done == ()
    assert ("link", "top") in [(problem.kind, problem.file) for problem in made.remaining]
    assert stores.files(tmp_path / "elsewhere") == before
    assert (store / "top").is_symlink()


def test_an_unfinished_store_loses_its_leftovers_only(tmp_path, stores, whole):
    spec = stores.two_levels
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21), LABELS, stop_after=2)
    before = stores.files(path)
    (path / "samples/part-000002.parquet").write_bytes(b"x")
    made = repair_store(path)
    assert (made.done, made.remaining, made.complete) == (("samples/part-000002.parquet: removed",), (), False)
    assert stores.files(path) == before
    finish(stores, path)
    assert stores.files(path) == whole


def test_a_dry_run_says_the_same_and_touches_nothing(store, stores):
    (store / commit_file(2)).unlink()
    (store / "top/c/0/0/0").write_bytes(b"x")
    before = stores.files(store)
    said = repair_store(store, dry_run=True)
    assert stores.files(store) == before
    assert repair_store(store) == said


def test_a_store_that_is_being_written_is_refused(store):
    lock = hold_lock(store, "")
    with pytest.raises(UsageError, match="A job is writing"):
        repair_store(store)
    os.close(lock)
    repair_store(store)


def test_a_damaged_group_is_refused(store):
    (store / "zarr.json").write_bytes((store / "zarr.json").read_bytes().replace(b'"num_rows": 21', b'"num_rows": 20'))
    with pytest.raises(CodesError, match="Restore it from a copy"):
        repair_store(store)


class Killed(BaseException):
    """A kill: nothing may catch it."""


def kill_after(monkeypatch, steps):
    """Lets so many changes of the disk happen, then no more."""
    left = itertools.count(-steps)

    def limited(change):
        def run(*arguments, **options):
            if next(left) >= 0:
                raise Killed
            return change(*arguments, **options)

        return run

    monkeypatch.setattr(places_module, "write_whole", limited(places_module.write_whole))
    monkeypatch.setattr(Path, "unlink", limited(Path.unlink))


def test_a_kill_at_any_moment_costs_nothing(store, stores, whole, tmp_path):
    (store / commit_file(2)).unlink()
    (store / "stray").write_bytes(b"x")
    (store / "label/zarr.json").write_bytes(b"x")
    for name in ("top/c/0/0/0", "bottom/c/1/0/0"):
        data = bytearray((store / name).read_bytes())
        data[20] ^= 1  # of the same size
        (store / name).write_bytes(data)
    for steps in itertools.count():
        copy = shutil.copytree(store, tmp_path / f"after-{steps}.zarr")
        try:
            with pytest.MonkeyPatch.context() as patch:
                kill_after(patch, steps)
                repair_store(copy)
            killed = False
        except Killed:
            killed = True
        assert read_spec(copy).complete == (steps <= 2), "once the damaged files are gone, readers refuse it"
        if not read_spec(copy).complete:  # the job may come before the second repair
            job_first = shutil.copytree(copy, tmp_path / f"job-after-{steps}.zarr")
            finish(stores, job_first)
            assert stores.files(job_first) == whole, steps
        repair_store(copy)
        finish(stores, copy)
        assert stores.files(copy) == whole, steps
        if not killed:
            break
    assert steps > 8


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whatever_was_damaged_repair_and_the_job_make_the_store_again_or_say_what_remains(
    tmp_path_factory, finished_store, stores, data
):
    store = shutil.copytree(finished_store, tmp_path_factory.mktemp("any") / "codes.zarr")
    names = sorted(stores.files(store).keys() - {"zarr.json"})
    for name in data.draw(st.sets(st.sampled_from(names), max_size=4)):
        content = data.draw(st.sampled_from([None, b"", b"x", b"{}"]))
        (store / name).unlink() if content is None else (store / name).write_bytes(content)
    made = repair_store(store)
    records = [(store / commit_file(shard)).is_file() for shard in range(3)]
    if made.remaining:
        assert any(problem.kind == "record" for problem in made.remaining)
        assert made.complete
    else:
        assert records == sorted(records, reverse=True)
        finish(stores, store)
        assert stores.files(store) == stores.files(finished_store)


def test_the_plan_is_pure(stores):
    spec = replace(stores.two_levels, num_rows=21, num_commits=3, complete=True)
    names = [commit_file(shard) for shard in range(3)]
    plan = plan_repair(spec, [Problem("record", names[2], "", shards=(2, 2))], names)
    assert (plan.tail, plan.remove) == ((names[2],), ())
    assert plan.spec == replace(spec, num_rows=16, num_commits=2, complete=False)
    assert plan.rewrite == ("bottom/zarr.json", "label/zarr.json", "top/zarr.json", "zarr.json")
