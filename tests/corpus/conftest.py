"""Small generated corpora."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image


def picture(seed: int, width: int = 20, height: int = 16, kind: str = "PNG") -> bytes:
    """An image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 12 PNGs, with things beside them that are no images."""
    root = tmp_path / "photos"
    for index in range(24):
        path = root / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
    (root / "README.txt").write_text("photos")
    (root / "cat" / "film.MP4").write_bytes(b"film")
    (root / ".hidden.png").write_bytes(picture(99))
    return root


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three tars of 10 samples, written by webdataset."""
    root = tmp_path / "tars"
    root.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(root / f"{shard:06d}.tar")) as writer:
            for index in range(10):
                number = shard * 10 + index
                writer.write(
                    {
                        "__key__": f"sample/{number:04d}",
                        "png": picture(number),
                        "cls": str(number % 5).encode(),
                        "txt": f"picture {number} in grün".encode(),
                        "json": json.dumps({"label": 7, "number": number}).encode(),
                    }
                )
    return root
