"""Outputs: resumed with the same settings, refused with others, never half-made under their final name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.outputs import OutputFolder, require_room, run_record
from pipelines.pictures import check_picture, code_colours, image_grid, save_picture
from vqmill.errors import UsageError


def test_a_folder_is_made_beside_and_renamed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OutputFolder(out, {"seed": 0}) as place:
        assert not out.exists()
        assert (place.finished, place.resumed) == (False, False)
        (place.folder / "weights").write_text("w")
        place.finish()
    assert (out / "weights").read_text() == "w"
    assert not place.folder.exists()


def test_the_same_settings_resume_or_are_done(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with OutputFolder(out, {"seed": 0, "sizes": (1, 2)}) as place:
        (place.folder / "half").write_text("h")
    with OutputFolder(out, {"seed": 0, "sizes": (1, 2)}) as place:
        assert place.resumed
        assert (place.folder / "half").read_text() == "h"
        place.finish()
    with OutputFolder(out, {"seed": 0, "sizes": (1, 2)}) as place:
        assert place.finished


@pytest.mark.parametrize("finish", [False, True])
def test_other_settings_are_refused_with_the_difference(tmp_path: Path, finish: bool) -> None:
    out = tmp_path / "run"
    with OutputFolder(out, {"fit": {"seed": 0}}) as place:
        if finish:
            place.finish()
    with pytest.raises(UsageError, match=r"fit\.seed: there 0, now 1"):
        OutputFolder(out, {"fit": {"seed": 1}})


def test_foreign_folders_and_second_jobs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"is not the output of this command\. Choose another --out\.$"):
        OutputFolder(tmp_path / "photos", {})
    with OutputFolder(tmp_path / "run", {}), pytest.raises(UsageError, match="Another job"):
        OutputFolder(tmp_path / "run", {})


@pytest.mark.parametrize("finish", [False, True])
def test_the_output_of_another_command_is_not_to_be_removed(tmp_path: Path, finish: bool) -> None:
    out = tmp_path / "tok"
    with OutputFolder(out, {"command": "train-tokenizer"}) as place:
        if finish:
            place.finish()
    with pytest.raises(
        UsageError, match=r"not the output of this command but of train-tokenizer\. Choose another --out\.$"
    ):
        OutputFolder(out, {"command": "evaluate"})


def test_room_is_checked_before_work(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(UsageError, match="free"):
        require_room(tmp_path, shutil.disk_usage(tmp_path).free)


def test_the_record_says_what_ran() -> None:
    record = run_record(workers=2)
    assert record["workers"] == 2
    assert {"torch", "zarr", "ray"} <= record["versions"].keys()


def test_a_picture_carries_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = image_grid(np.zeros((3, 1, 4, 5), np.uint8), columns=2, scale=2)
    assert picture.size == (2 * 12 - 2, 2 * 10 - 2)
    check_picture(path, {"seed": 0})
    save_picture(path, picture, {"seed": 0})
    check_picture(path, {"seed": 0})
    with pytest.raises(UsageError, match="seed: there 0, now 1"):
        check_picture(path, {"seed": 1})
    with pytest.raises(UsageError, match=r"\.png"):
        check_picture(tmp_path / "a.jpg", {})
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(UsageError, match="not a picture"):
        check_picture(tmp_path / "b.png", {})


def test_code_colours_tell_codes_apart() -> None:
    colours = code_colours(np.arange(64).reshape(1, 8, 8), 16)
    assert colours.shape == (1, 3, 16, 16)
    assert len({tuple(colours[0, :, y, x]) for y in range(0, 16, 2) for x in range(0, 16, 2)}) == 64
    assert (colours[0, :, 0, 0] == colours[0, :, 1, 1]).all()
