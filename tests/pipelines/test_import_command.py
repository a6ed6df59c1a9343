"""`vqmill import-checkpoint` on real files: what comes out is a tokenizer for every other command; what cannot be trusted is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

import tokenizer
import vqmill
from pipelines.cli import app
from vqmill.verify import verify_store


def run(*words: str | Path) -> int:
    return app([str(word) for word in words])


@pytest.fixture
def weights(published: ModuleType, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save({"model": published.Rosinality().state_dict(), "epoch": 3}, path)
    return path


@pytest.mark.usefixtures("ray_session")
def test_from_a_file_to_codes_and_back(
    weights: Path, scenes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "tok", tmp_path / "codes.zarr"
    command = ("import-checkpoint", weights, "--layout", "rosinality", "--out", out, "--size", "16", "--json")
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "the weights lay under 'model'; left aside: epoch" in printed
    assert "\nsize: 16 pixels\npixel-range: black -1, white 1 (no tensor tells; as rosinality trains." in printed
    facts = json.loads(printed.splitlines()[-1])
    model = tokenizer.load(out)
    assert (model.fingerprint, model.size) == (facts["fingerprint"], 16)
    assert sorted(path.name for path in out.iterdir()) == ["run.json", "settings.json", "tokenizer.safetensors"]
    record = json.loads((out / "run.json").read_bytes())
    assert (record["fingerprint"], record["settings"]["layout"]) == (model.fingerprint, "rosinality")
    assert run(*command) == 0
    assert "already imported" in capsys.readouterr().out

    assert run("tokenize", scenes, "--tokenizer", out, "--out", store, "--workers", "1") == 0
    assert verify_store(store).problems == ()
    assert vqmill.open_codes(store).spec.tokenizer["preset"] == "imported-rosinality"
    assert run("decode", store, "--out", tmp_path / "grid.png") == 0
    assert run("inspect", out) == 0
    assert "preset imported-rosinality" in capsys.readouterr().out


def test_settings_that_differ_are_refused(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("import-checkpoint", weights, "--layout", "rosinality", "--out", tmp_path / "tok")
    assert run(*command) == 0
    assert "size: 256 pixels (no tensor tells; as rosinality trains. Otherwise say --size)" in capsys.readouterr().out
    assert run(*command, "--pixel-range", "unit") == 2
    assert "tokenizer.pixel_range.0: there -1.0, now 0.0" in capsys.readouterr().err


class Evil:
    """Its unpickling would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def spoil(kind: str, path: Path, state: OrderedDict[str, torch.Tensor]) -> None:
    """A file that must not be imported."""
    if kind == "code":
        torch.save({"state_dict": state, "hook": Evil(path.parent / "evil")}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(path.parent / "evil")))
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "flipped":
        torch.save(state, path)
        data = bytearray(path.read_bytes())
        largest = max(state.values(), key=torch.numel)
        data[data.index(largest.numpy().tobytes()[:64]) + 30] ^= 1
        path.write_bytes(bytes(data))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "safetensors":
        path.write_bytes(safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}))
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "nan":
        state["quantize_conv_t.bias"][0] = float("nan")
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code", "reading it would run code (Trying to load unsupported GLOBAL posix.mkdir"),
        ("pickle", "reading it would run code"),
        ("cut", "not a whole checkpoint"),
        ("flipped", "damaged: the CRC of"),
        ("empty", "not a whole checkpoint"),
        ("picture", "no checkpoint of torch"),
        ("safetensors", "expected a .pt file of torch, found safetensors"),
        ("list", "expected a state dict"),
        ("nan", "tensor 'quantize_conv_t.bias' holds NaN"),
    ],
    ids=["code", "pickle", "cut", "flipped", "empty", "picture", "safetensors", "list", "nan"],
)
def test_bad_files_are_refused(
    kind: str, message: str, published: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pt"
    spoil(kind, path, published.Rosinality().state_dict())
    assert run("import-checkpoint", path, "--layout", "rosinality", "--out", tmp_path / "tok") == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "evil").exists(), "the file has run code"
    assert not (tmp_path / "tok").exists()


def test_a_missing_file_and_a_bad_size_are_usage(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("import-checkpoint", tmp_path / "none.pt", "--layout", "zalando", "--out", tmp_path / "tok") == 2
    assert "no such file" in capsys.readouterr().err
    assert run("import-checkpoint", weights, "--layout", "rosinality", "--out", tmp_path / "tok", "--size", "20") == 1
    assert "size: expected a multiple of 8 pixels, found 20" in capsys.readouterr().err
