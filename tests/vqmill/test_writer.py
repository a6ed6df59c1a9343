"""Commits: killed anywhere and resumed, locked, refused with other settings, durable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vqmill
from vqmill import CodesError, LevelSpec
from vqmill import files as files_module
from vqmill import places as places_module
from vqmill.settings import different_settings
from vqmill.writer import Commit, Counts, Cursor, StoreWriter, write_shard


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def killing_write(monkeypatch, after):
    """The process dies while write number `after` is under way: half a file lies beside its place, as after SIGKILL."""
    written = []

    def write(path, data):
        if len(written) == after:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f"{path.name}.dead{files_module.PARTIAL_SUFFIX}").write_bytes(data[: len(data) // 2])
            raise Killed
        files_module.write_whole(path, data)
        written.append(path)

    monkeypatch.setattr(places_module, "write_whole", write)
    return written


def test_killed_after_every_single_write_and_resumed(tmp_path, stores, monkeypatch):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    labels = list(range(21))
    writes = killing_write(monkeypatch, None)
    expected = stores.files(stores.write(tmp_path / "whole.zarr", spec, codes, labels))
    assert len(writes) >= 4 + 3 * (5 + 5) + 1  # create, three Zarr shards with their commits, finish
    seen = set()
    for after in range(len(writes)):
        path = tmp_path / f"{after}" / "codes.zarr"
        killing_write(monkeypatch, after)
        with pytest.raises(Killed):
            stores.write(path, spec, codes, labels)
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        if path.exists():
            with pytest.raises(CodesError, match="unfinished"):
                vqmill.open_codes(path)
            read = vqmill.open_codes(path, allow_incomplete=True)
            assert len(read) in (0, 8, 16, 21)
            seen.add(len(read))
            for name, values in codes.items():
                np.testing.assert_array_equal(read[name][:], values[: len(read)])
            assert read.samples()["label"].to_pylist() == labels[: len(read)] == read.labels.tolist()
            assert read.quarantine().num_rows == read.spec.num_commits
        stores.write(path, spec, codes, labels)
        assert stores.files(path) == expected, f"killed after {after} writes"
        assert sorted(entry.name for entry in path.parent.iterdir()) == [".codes.zarr.lock", "codes.zarr"]
    assert seen == {0, 8, 16, 21}


def test_killed_before_the_new_store_is_renamed(tmp_path, stores, monkeypatch):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 9)

    def killed(self, target):
        raise Killed

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        stores.write(tmp_path / "codes.zarr", spec, codes)
    monkeypatch.undo()
    assert not (tmp_path / "codes.zarr").exists()
    path = stores.write(tmp_path / "codes.zarr", spec, codes)
    assert stores.files(path) == stores.files(stores.write(tmp_path / "other.zarr", spec, codes))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        ".codes.zarr.lock",
        ".other.zarr.lock",
        "codes.zarr",
        "other.zarr",
    ]


def test_a_resumed_store_has_no_array_ahead_of_it(tmp_path, stores, monkeypatch):
    """Other readers follow the arrays' shapes: rows whose Zarr shard was swept must not be counted there."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    path = tmp_path / "codes.zarr"
    killing_write(monkeypatch, 4 + 10 + 5 + 1 + 2)  # the second commit: its record and two arrays' metadata are there
    with pytest.raises(Killed):
        stores.write(path, spec, codes)
    monkeypatch.undo()
    assert json.loads((path / "top/zarr.json").read_bytes())["shape"][0] == 16
    StoreWriter(path, spec).close()
    shapes = {name: json.loads((path / name / "zarr.json").read_bytes())["shape"][0] for name in ("top", "bottom")}
    assert shapes == {"top": 8, "bottom": 8}


def test_the_cursor_and_counts_of_the_last_commit_are_taken_up(tmp_path, stores):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    path = stores.write(tmp_path / "codes.zarr", spec, codes, stop_after=2)
    with StoreWriter(path, spec) as writer:
        assert writer.cursor == Cursor(input_shard=2, span=0, row=0)
        assert writer.counts == Counts(encoded=16, quarantined=2)
        assert writer.counts.seen == 18
        assert [commit.first_row for commit in writer.commits] == [0, 8]
    with StoreWriter(tmp_path / "new.zarr", spec) as writer:
        assert (writer.cursor, writer.counts) == (Cursor(), Counts())


def test_leftovers_are_swept(tmp_path, stores):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    path = stores.write(tmp_path / "codes.zarr", spec, codes, stop_after=2)
    before = stores.files(path)
    for name in ("top/c/2/0/0", "samples/part-000002.parquet", "commits/shard-000002.json.x.partial", "stray", "a/b"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"left over")
    StoreWriter(path, spec).close()
    assert stores.files(path) == before


@pytest.mark.parametrize("name", ["bottom", "commits", "top/c/0/0/0", "stray"])
@pytest.mark.parametrize("finished", [False, True])
def test_links_inside_a_store_are_neither_followed_nor_removed(tmp_path, stores, name, finished):
    """Somebody moved a part of the store to another disk: an unfinished store is not gone on with, nor one whose records are elsewhere."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    path = stores.write(tmp_path / "codes.zarr", spec, codes, stop_after=None if finished else 2)
    outside = tmp_path / "outside"
    (path / name).rename(outside) if (path / name).exists() else outside.write_text("keep me")
    (path / name).symlink_to(outside)
    if finished and name != "commits":
        StoreWriter(path, spec).close()
    else:
        with pytest.raises(CodesError, match=f"{name}.* symbolic link"):
            StoreWriter(path, spec)
    assert (path / name).is_symlink()
    assert outside.exists()


def test_a_store_is_locked_by_whatever_name_it_is_called(tmp_path, stores):
    path = stores.write(tmp_path / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 21), stop_after=1)
    (tmp_path / "link.zarr").symlink_to(path)
    with StoreWriter(path, stores.two_levels), pytest.raises(CodesError, match="locked"):
        StoreWriter(tmp_path / "link.zarr", stores.two_levels)


def test_what_orphans_of_a_killed_job_wrote_is_swept_before_a_store_is_complete(tmp_path, stores, monkeypatch):
    """Writer processes may outlive a job that was killed, and write after the next job's first sweep."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    path = tmp_path / "codes.zarr"
    with StoreWriter(stores.write(path, spec, codes, finish=False), spec) as writer:
        for name in ("top/c/7/0/0", "samples/part-000007.parquet", "top/c/0/0/0.dead.partial"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"late")
        publish = writer._publish
        left = []
        monkeypatch.setattr(writer, "_publish", lambda **options: (left.extend(stores.files(path)), publish(**options)))
        writer.finish()
    assert not [name for name in left if "7" in name or "dead" in name]
    assert stores.files(path) == stores.files(stores.write(tmp_path / "other.zarr", spec, codes))


def test_a_folder_of_somebody_else_beside_the_store_is_kept(tmp_path, stores):
    """Training with `--out codes.zarr` works in `codes.zarr.partial`."""
    (tmp_path / "codes.zarr.partial").mkdir()
    (tmp_path / "codes.zarr.partial" / "resume.safetensors").write_bytes(b"hours of work")
    stores.write(tmp_path / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 3))
    assert (tmp_path / "codes.zarr.partial" / "resume.safetensors").read_bytes() == b"hours of work"


def test_a_finished_store_is_left_as_it_is(store, stores):
    before = stores.files(store)
    with StoreWriter(store, stores.two_levels) as writer:
        assert writer.spec.complete
        writer.finish()
        with pytest.raises(AssertionError):
            writer.commit(1, Cursor(), Counts(), {})
    assert stores.files(store) == before


def test_a_second_writer_is_refused(tmp_path, stores):
    with StoreWriter(tmp_path / "codes.zarr", stores.two_levels):
        with pytest.raises(CodesError, match=r"codes\.zarr.*[Aa]nother job"):
            StoreWriter(tmp_path / "codes.zarr", stores.two_levels)
        StoreWriter(tmp_path / "other.zarr", stores.two_levels).close()
    StoreWriter(tmp_path / "codes.zarr", stores.two_levels).close()


HOLDER = """
import sys
from pathlib import Path
from vqmill.layout import read_spec
from vqmill.writer import StoreWriter
path = Path(sys.argv[1])
writer = StoreWriter(path, read_spec(path))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_writer_in_another_process_is_respected_until_it_dies(tmp_path, stores):
    path = stores.write(tmp_path / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 9), finish=False)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CodesError, match=r"[Aa]nother job"):
            StoreWriter(path, stores.two_levels)
        assert len(vqmill.open_codes(path, allow_incomplete=True)) == 9  # readers need no lock
        holder.kill()
        holder.wait()
    StoreWriter(path, stores.two_levels).close()


def test_closing_twice_is_harmless(tmp_path, stores):
    with StoreWriter(tmp_path / "codes.zarr", stores.two_levels) as writer:
        writer.close()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"tokenizer": {"fingerprint": "beef"}}, ["tokenizer.fingerprint", '"beef"', '"' + "0" * 32 + '"']),
        ({"rows_per_shard": 16}, ["rows_per_shard: there 8, now 16"]),
        ({"preprocessing": {"size": 64}}, ["preprocessing.size: there 32, now 64", "preprocessing.crop"]),
        (
            {"levels": (LevelSpec("top", 512, (2, 3)), LevelSpec("bottom", 201, (4, 6)))},
            ["200", "201"],
        ),
        ({"levels": (LevelSpec("top", 512, (2, 3)),)}, ["bottom"]),
        ({"corpus": {"description": "made up", "num_samples": 25}}, ["corpus.num_samples: there 24, now 25"]),
    ],
)
def test_other_settings_are_refused_and_shown(store, stores, change, shown):
    before = stores.files(store)
    with pytest.raises(CodesError) as caught:
        StoreWriter(store, replace(stores.two_levels, **change))
    for text in shown:
        assert text in str(caught.value)
    assert stores.files(store) == before


def test_a_long_difference_still_shows_what_differs():
    names = [f"class {number}" for number in range(100)]
    shown = "\n".join(different_settings({"names": names}, {"names": [*names[:-1], "zebra"]}))
    assert "zebra" in shown
    assert "class 99" in shown


def test_settings_are_compared_as_json(tmp_path, stores):
    """What was written as a tuple comes back as a list: no difference."""
    spec = replace(stores.two_levels, preprocessing={"size": (32, 32)}, corpus={"class_names": ("a", "b")})
    StoreWriter(tmp_path / "codes.zarr", spec).close()
    StoreWriter(tmp_path / "codes.zarr", spec).close()


def test_what_is_not_a_store_is_not_touched(tmp_path, stores):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"x")
    with pytest.raises(CodesError, match="not a code store"):
        StoreWriter(tmp_path / "photos", stores.two_levels)
    (tmp_path / "group").mkdir()
    (tmp_path / "group/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(CodesError, match="not a vqmill"):
        StoreWriter(tmp_path / "group", stores.two_levels)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CodesError):
        StoreWriter(tmp_path / "file", stores.two_levels)
    assert (tmp_path / "photos/a.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"x"


def test_an_empty_folder_becomes_a_store(tmp_path, stores):
    (tmp_path / "a" / "codes.zarr").mkdir(parents=True)
    path = stores.write(tmp_path / "a" / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 3))
    assert len(vqmill.open_codes(path)) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"shard": 0}', b"[" * 100_000, b"\xff"])
def test_a_damaged_commit_record_stops_a_resume(tmp_path, stores, content):
    spec = stores.two_levels
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 21), stop_after=2)
    (path / "commits/shard-000001.json").write_bytes(content)
    with pytest.raises(CodesError, match="shard-000001"):
        StoreWriter(path, spec)
    (path / "commits/shard-000001.json").unlink()
    with pytest.raises(CodesError, match=r"shard-000001.*missing"):
        StoreWriter(path, spec)
    assert (path / "top/c/1/0/0").exists()


def test_a_commit_record_survives_its_file(tmp_path):
    commit = Commit(3, 24, 5, Cursor(1, 2, 3), Counts(5, 1, 2), {"top/c/3/0/0": {"bytes": 3, "sha256": "ab" * 32}})
    (tmp_path / "record.json").write_bytes(commit.to_bytes())
    assert Commit.read(tmp_path, "record.json") == commit
    assert b'"cursor": {' in commit.to_bytes()


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"bytes": "x", "sha256": "ab" * 32},
        {"bytes": -1, "sha256": "ab" * 32},
        {"bytes": 3, "sha256": "ab"},
        {"bytes": 3},
    ],
)
def test_a_record_that_says_nonsense_of_a_file_is_damaged(tmp_path, facts):
    commit = Commit(3, 24, 5, Cursor(1, 2, 3), Counts(5, 1, 2), {"top/c/3/0/0": facts})
    (tmp_path / "record.json").write_bytes(commit.to_bytes())
    with pytest.raises(CodesError, match="damaged commit record"):
        Commit.read(tmp_path, "record.json")


def test_only_the_last_zarr_shard_may_be_ragged(tmp_path, stores):
    """A short Zarr shard with more rows behind it would shift every later row: our own mistake, so it asserts."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 3)
    with StoreWriter(tmp_path / "codes.zarr", spec) as writer:
        for shard in (0, 1):
            samples = stores.samples([None] * 3)
            files = write_shard(writer.store, writer.spec, shard, codes, samples, stores.quarantine(shard))
            if shard == 0:
                writer.commit(3, Cursor(1), Counts(3), files)
        with pytest.raises(AssertionError):
            writer.commit(3, Cursor(2), Counts(3), files)


@pytest.mark.parametrize("mistake", ["rows", "files"])
def test_a_commit_that_disagrees_with_its_files_asserts(tmp_path, stores, mistake):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 3)
    with StoreWriter(tmp_path / "codes.zarr", spec) as writer:
        files = write_shard(writer.store, writer.spec, 0, codes, stores.samples([None] * 3), stores.quarantine(0))
        if mistake == "files":
            del files["top/c/0/0/0"]
        with pytest.raises(AssertionError):
            writer.commit(9 if mistake == "rows" else 3, Cursor(1), Counts(3), files)


def test_rows_and_samples_that_differ_in_number_assert(tmp_path, stores):
    codes, samples = stores.codes(stores.two_levels, 3), stores.samples([None] * 2)
    with pytest.raises(AssertionError, match="top"):
        write_shard(tmp_path, stores.two_levels, 0, codes, samples, stores.quarantine(0))


def test_every_file_and_every_new_folder_is_made_durable(tmp_path, stores, monkeypatch):
    """After a power cut a commit must not outlive the files it counts, nor the folders that lead to them."""
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    path = stores.write(tmp_path / "new" / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 9))
    not_synced = [
        entry.relative_to(tmp_path).as_posix()
        for entry in [path.parent, path, *path.rglob("*")]
        if entry.stat().st_ino not in synced
    ]
    assert not_synced == []


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files_module.write_whole(tmp_path / "file", b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]
