"""What the tests of stores share beside the builders of ../conftest.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vqmill
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


@pytest.fixture(scope="session")
def numbered(tmp_path_factory, stores):
    """A store of 53 rows whose labels are its row numbers, and its codes in memory."""
    rows = stores.codes(stores.two_levels, 53)
    path = tmp_path_factory.mktemp("loader") / "codes.zarr"
    stores.write(path, stores.two_levels, rows, list(range(53)))
    return vqmill.open_codes(path), rows


@pytest.fixture
def memory_for(stores):
    """Gives `pool_bytes` for so many rows of `numbered`, a quarter of it being kept for what is in hand."""
    return lambda rows: -(-rows * (stores.two_levels.row_bytes + 64) * 4 // 3) + 3


@pytest.fixture(params=[3, 10, 30, 10_000], ids=lambda rows: f"pool{rows}")
def pool(request, memory_for):
    """Memory for the fewest rows that will do, for some pools an epoch, and for all rows in one."""
    return {"pool_bytes": memory_for(request.param)}
