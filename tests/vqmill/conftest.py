"""What the tests of stores share beside the builders of ../conftest.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_fsync(no_fsync):
    """Everywhere in this folder."""


@pytest.fixture
def store(tmp_path, finished_store) -> Path:
    """A copy of the finished store, to be damaged."""
    return shutil.copytree(finished_store, tmp_path / "codes.zarr")
