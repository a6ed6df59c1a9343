"""Disks that are full, and places where nobody may write: a clear end; what was committed stays, and the same command goes on."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vqmill
from pipelines import tokenize as tokenize_module
from pipelines.cli import app
from vqmill import files as files_module
from vqmill import places as places_module
from vqmill.layout import find_spec
from vqmill.verify import verify_store

DISK_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, a megabyte large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if made.returncode:
        pytest.skip(f"a disk of our own needs the right to mount one: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def words(scenes: str, tokenizer_folder: Path, out: Path) -> list[str]:
    return [
        "tokenize", scenes, "--tokenizer", str(tokenizer_folder), "--out", str(out), "--shard-rows", "20", "--workers", "1", "--device", "cpu"
    ]  # fmt: skip


def test_a_disk_that_fills_up(
    disk: Path, scenes: str, tokenizer_folder: Path, reference: Path, stores: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, asked = disk / "codes.zarr", words(scenes, tokenizer_folder, disk / "codes.zarr")
    assert app(asked) == 2, "so little room is seen before the work begins"
    assert "free there" in capsys.readouterr().err
    monkeypatch.setattr(tokenize_module, "require_room", lambda place, needed: None)  # others take it later
    filler = disk / "filler"
    held = 0
    for left in (30_000, 250_000):
        filler.write_bytes(bytes(DISK_BYTES - left))
        assert app(asked) == 1
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert f"{out}" in said
        assert "Free some room there." in said
        assert "To try again: " in said
        found = find_spec(out)
        if found is not None:
            codes = vqmill.open_codes(out, allow_incomplete=True)
            assert len(codes) == found.num_rows >= held
            assert not verify_store(out).damage
            held = found.num_rows
    assert held > 0, "nothing was ever committed"
    filler.unlink()
    assert app(asked) == 0
    assert stores.files(out) == stores.files(reference)


def test_a_disk_that_may_only_be_read(
    disk: Path, scenes: str, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", f"remount,ro,size={1 << 30}", str(disk)], check=True)
    assert app(words(scenes, tokenizer_folder, disk / "codes.zarr")) == 1
    said = capsys.readouterr().err
    assert "Read-only file system" in said
    assert f"{disk}/codes.zarr" in said
    assert "choose another --out" in said
    assert not list(disk.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_where_one_may_not_write(
    tmp_path: Path, scenes: str, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    assert app(words(scenes, tokenizer_folder, tmp_path / "theirs" / "codes.zarr")) == 1
    said = capsys.readouterr().err
    assert "Permission denied" in said
    assert "choose another --out" in said


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int | None) -> Callable[[], int]:
    """Each file after so many fails half-way, as on a full disk; counts them."""
    done: list[Path] = []
    sync = os.fsync

    def write(path: Path, data: bytes) -> None:
        full = len(done) == writes

        def fsync(descriptor: int) -> None:
            if full and stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.ftruncate(descriptor, len(data) // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(files_module.os, "fsync", fsync)
        files_module.write_whole(path, data)
        done.append(path)

    monkeypatch.setattr(places_module, "write_whole", write)
    return lambda: len(done)


def test_a_disk_that_is_full_at_any_write(
    tmp_path: Path, stores: Any, monkeypatch: pytest.MonkeyPatch, no_fsync: None
) -> None:
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 13)
    with monkeypatch.context() as patch:
        count = full_after(patch, None)
        expected = stores.files(stores.write(tmp_path / "whole.zarr", spec, codes))
    assert count() >= 4 + 2 * (5 + 5) + 1
    for after in range(count()):
        path = tmp_path / str(after) / "codes.zarr"
        with monkeypatch.context() as patch:
            full_after(patch, after)
            with pytest.raises(OSError, match=r"No space left on device: '.*codes\.zarr") as error:
                stores.write(path, spec, codes)
        assert error.value.errno == errno.ENOSPC
        assert not list(path.parent.rglob("*.partial")), "half a file is left, and takes room"
        stores.write(path, spec, codes)
        assert stores.files(path) == expected, f"full after {after} writes"
