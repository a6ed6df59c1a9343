"""Examples do what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import vqmill
from pipelines.cli import app


@pytest.mark.usefixtures("ray_session")
def test_a_diffusers_vqmodel_fills_a_store(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(Path(__file__).parents[1])
    module, store = "examples.diffusers_vqmodel:make", tmp_path / "codes.zarr"
    assert app(["check-tokenizer", module]) == 0
    assert capsys.readouterr().out.count("pass: ") == 8
    words = ["tokenize", scenes, "--tokenizer-module", module, "--out", str(store), "--workers", "1", "--size", "16"]
    assert app(words) == 0
    codes = vqmill.open_codes(store)
    assert codes["codes"].shape == (300, 4, 4)
    assert len(set(codes["codes"][:].flatten().tolist())) > 4
    capsys.readouterr()
    assert app(["evaluate", scenes, "--tokenizer-module", module, "--limit", "8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["images"], figures["size"], figures["codes/codebook_size"]) == (8, 32, 64)
    assert 0 < figures["ssim"] < 1
    assert app(["decode", str(store), "--tokenizer-module", module, "--out", str(tmp_path / "grid.png")]) == 0
