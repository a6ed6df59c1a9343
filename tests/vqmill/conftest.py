"""What the tests of stores share beside the builders of ../conftest.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vqmill import native


@pytest.fixture(autouse=True)
def _no_fsync(no_fsync):
    """Everywhere in this folder."""


@pytest.fixture
def store(tmp_path, finished_store) -> Path:
    """A copy of the finished store, to be damaged."""
    return shutil.copytree(finished_store, tmp_path / "codes.zarr")


@pytest.fixture(params=["python", "compiled"])
def both_ways(request, monkeypatch):
    """Chunks are read in Python, then by compiled code from the first one on."""
    chosen = native.Native(worth_bytes=0 if request.param == "compiled" else 2**62)
    if request.param == "compiled":
        try:
            native.load()
        except native.UnavailableError as error:
            pytest.skip(str(error))
    monkeypatch.setattr(native, "PROCESS", chosen)
    return request.param
