"""Small generated corpora, and an S3 server."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
import webdataset
from PIL import Image

from pipelines.corpus import objects


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


class S3:
    """What tests know of the S3 server that they started: moto's, a process on the loopback."""

    bucket = "corpora"
    key_id, secret, token = "sentinel-key-id-0815", "sentinel-secret-4711", "sentinel-token-2342"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_SESSION_TOKEN": self.token,
            "AWS_REGION": "us-east-1",
        }

    @staticmethod
    def put(address: str, name: str, data: bytes) -> None:
        """Puts one object below an address."""
        store = obstore.store.from_url(address, client_options={"allow_http": True})  # pyright: ignore
        obstore.put(store, name, data)

    @staticmethod
    def delete(address: str, name: str) -> None:
        """Removes it."""
        store = obstore.store.from_url(address, client_options={"allow_http": True})  # pyright: ignore
        obstore.delete(store, name)

    def upload(self, folder: Path, address: str) -> str:
        """Puts a folder's files at an address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(address, path.relative_to(folder).as_posix(), path.read_bytes())
        return address


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A running S3 server with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        bucket = urllib.request.Request(f"http://127.0.0.1:{port}/{S3.bucket}", method="PUT")
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(bucket).close()
                break
            except OSError:
                time.sleep(0.1)
        yield S3(f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, and an environment that reaches it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    objects._store.cache_clear()
    objects.open_object.cache_clear()
    return s3_server


@pytest.fixture
def address(s3: S3, request: pytest.FixtureRequest) -> str:
    """An address in the bucket that no other test uses."""
    return f"s3://{s3.bucket}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
