"""The chain on real corpora: photographs, hostile files, published archives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vqmill
from pipelines.cli import app
from vqmill.verify import verify_store

pytestmark = [pytest.mark.realdata, pytest.mark.usefixtures("ray_session")]


def tokenize(corpus: str, folder: Path, out: Path) -> int:
    return app(["tokenize", corpus, "--tokenizer", str(folder), "--out", str(out), "--workers", "2", "--json"])


def test_hostile_images_become_quarantine_rows(
    real_data: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes.zarr"
    assert tokenize(str(real_data / "hostile" / "images"), tokenizer_folder, out) == 3
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = json.loads((real_data / "hostile" / "manifest.json").read_bytes())
    files = len(list((real_data / "hostile" / "images").iterdir()))
    assert report["seen"] == files == report["encoded"] + report["quarantined"]
    codes = vqmill.open_codes(out)
    bad = set(codes.quarantine()["source"].to_pylist())
    expected = {
        name.removeprefix("images/")
        for name, facts in manifest.items()
        if name.startswith("images/") and not facts["pillow"]["ok"]
    }
    assert bad == expected
    assert verify_store(out).problems == ()


@pytest.mark.parametrize(
    "name",
    ["mixed_good_and_bad", "truncated", "missing_image", "duplicate_keys", "upper_ext", "dotted_and_nested_keys"],
)
def test_hostile_tars_lose_nothing(real_data: Path, tokenizer_folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "codes.zarr"
    code = tokenize(str(real_data / "hostile" / "tars" / f"{name}.tar"), tokenizer_folder, out)
    found = verify_store(out)
    assert found.problems == ()
    assert code == (3 if found.counts.quarantined else 0)
    assert found.counts.encoded == found.rows


def test_photographs_keep_labels_captions_and_sizes(real_data: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes.zarr"
    assert tokenize(str(real_data / "imagenet-wds" / "{000000..000001}.tar"), tokenizer_folder, out) == 0
    samples = vqmill.open_codes(out).samples().to_pylist()
    assert len(samples) == 96
    for sample in samples:
        facts = json.loads(sample["json"])
        assert sample["label"] == facts["label"]
        assert sorted((sample["width"], sample["height"])) == sorted((facts["width"], facts["height"])), (
            "upright, by EXIF"
        )


def test_published_archives_are_read_in_place(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = real_data / "fashion-mnist"
    before = sorted(root.rglob("*"))
    assert app(["inspect", f"torchvision:FashionMNIST?root={root}&split=test", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["seen"], report["classes"]) == (10_000, 10)
    assert sorted(root.rglob("*")) == before
