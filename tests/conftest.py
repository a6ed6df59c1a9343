"""What all tests share: where the real data lies, small stores, and one Ray for the whole session."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from torchvision.models.inception import Inception3

import tokenizer
from pipelines.cluster import ray_cluster
from pipelines.corpus import objects as corpus_objects
from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.samples import read_samples
from pipelines.scenes import write_corpus
from pipelines.tokenize import TokenizeOptions, tokenize_corpus
from vqmill.bucket import Bucket
from vqmill.files import sealed
from vqmill.spec import LevelSpec, StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard

DATA_ENVIRONMENT = "VQMILL_DATA"


class Stores:
    """Builds what the tests read. Input shard i of the pretended corpus is Zarr shard i, with one bad sample at its end."""

    two_levels = StoreSpec(
        levels=(LevelSpec("top", 512, (2, 3)), LevelSpec("bottom", 200, (4, 6))),
        rows_per_shard=8,
        tokenizer={"fingerprint": "0" * 32, "preset": "rgb32", "precision": "float32"},
        preprocessing={"size": 32, "crop": "center", "decoder": "none 1.0"},
        corpus={"description": "made up", "num_samples": 24, "class_names": ["cat", "dog"], "skipped": {}},
        codec="blosc-zstd",
    )

    @staticmethod
    def codes(spec, num_rows, seed=0):
        """Codes by level, dtype int64, that include 0 and K-1."""
        generator = np.random.default_rng(seed)
        codes = {
            level.name: generator.integers(0, level.codebook_size, (num_rows, *level.grid)) for level in spec.levels
        }
        for level in spec.levels if num_rows else ():
            codes[level.name].reshape(-1)[0] = 0
            codes[level.name].reshape(-1)[-1] = level.codebook_size - 1
        return codes

    @staticmethod
    def samples(labels, first=0):
        rows = [
            {
                "key": f"class/sample-{first + i}",
                "source": "shard-é.tar",
                "input_shard": 0,
                "index": first + i,
                "label": label,
                "caption": f"caption {first + i}" if i % 2 else None,
                "json": json.dumps({"row": first + i}),
                "width": 28 + i,
                "height": 30,
            }
            for i, label in enumerate(labels)
        ]
        return pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)

    @staticmethod
    def quarantine(shard):
        row = {"key": f"bad-{shard}", "source": "shard-é.tar", "input_shard": shard, "index": 99}
        return pa.Table.from_pylist([row | {"reason": "truncated", "detail": "cut"}], schema=QUARANTINE_SCHEMA)

    def write(self, path, spec, codes, labels=None, *, finish=True, stop_after=None):
        """Creates or resumes a store from the cursor of its last commit, as a job does."""
        num_rows = len(next(iter(codes.values())))
        labels = [None] * num_rows if labels is None else labels
        with StoreWriter(path, spec) as writer:
            for shard in range(writer.cursor.input_shard, -(-num_rows // spec.rows_per_shard)):
                if shard == stop_after:
                    return path
                part = slice(shard * spec.rows_per_shard, (shard + 1) * spec.rows_per_shard)
                rows = {name: values[part] for name, values in codes.items()}
                samples = self.samples(labels[part], part.start)
                files = write_shard(path, writer.spec, shard, rows, samples, self.quarantine(shard))
                counts = Counts(encoded=samples.num_rows, quarantined=1)
                writer.commit(samples.num_rows, Cursor(input_shard=shard + 1), counts, files)
            if finish:
                writer.finish()
        return path

    @staticmethod
    def files(path):
        """The content of every file below a folder, by its name."""
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    @staticmethod
    def edit_json(path, change, *, seal=True):
        """Lets `change` alter a JSON file in place, and mends its checksum."""
        value = json.loads(path.read_bytes())
        change(value)
        holder = value["attributes"]["vqmill"] if path.name == "zarr.json" and value["attributes"] else value
        if seal and "sha256" in holder:
            holder.update(sealed(holder))
        path.write_text(json.dumps(value))

    def recommit(self, store, shard, name):
        """Makes the commit record agree with a file that was replaced, as a hostile or confused writer would."""
        data = (store / name).read_bytes()
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.edit_json(store / f"commits/shard-{shard:06d}.json", lambda record: record["files"].update({name: facts}))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Ctrl-C interrupts, though the tests be run in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def no_fsync(monkeypatch):
    """Durability has a test of its own; without fsync the others take a quarter of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class S3:
    """What tests know of the S3 server that they started: moto's, a process on the loopback."""

    bucket = "corpora"
    secret = "sentinel-secret-4711"
    key_id = "sentinel-key-id-0815"
    token = "sentinel-token-2342"

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
    def objects(url: str) -> dict[str, bytes]:
        """The content of every object below an address, by its name."""
        place = Bucket(url)
        return {name: place.get(name)[0] for name in place.list()}

    @staticmethod
    def upload(folder: Path, url: str) -> str:
        """Puts a folder's files at an address."""
        place = Bucket(url)
        for name, data in Stores.files(folder).items():
            place.write(name, data)
        return url

    @staticmethod
    def put(url: str, name: str, data: bytes) -> None:
        """Puts one object below an address."""
        Bucket(url).write(name, data)

    @staticmethod
    def delete(url: str, name: str) -> None:
        """Removes it."""
        Bucket(url).delete([name])


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
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://127.0.0.1:{port}/{S3.bucket}", method="PUT")
                ).close()
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
    corpus_objects._store.cache_clear()
    corpus_objects.open_object.cache_clear()
    return s3_server


@pytest.fixture
def address(s3: S3, request: pytest.FixtureRequest) -> str:
    """An address in the bucket that no other test uses."""
    return f"s3://{s3.bucket}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture(scope="session")
def stores() -> Stores:
    return Stores()


@pytest.fixture(scope="session")
def finished_store(tmp_path_factory, stores) -> Path:
    """Two levels, 21 rows in three Zarr shards of 8, labels 0, 1, ... and every fifth missing. Not to be changed."""
    labels = [None if row % 5 == 4 else row for row in range(21)]
    path = tmp_path_factory.mktemp("finished") / "codes.zarr"
    return stores.write(path, stores.two_levels, stores.codes(stores.two_levels, 21), labels)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora: $VQMILL_DATA, else `../shared/data` beside the project."""
    named = os.environ.get(DATA_ENVIRONMENT)
    folder = Path(named) if named else Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"no real data: set ${DATA_ENVIRONMENT} to the folder that holds fashion-mnist/, imagenet-wds/, hostile/ ..."
        )
    return folder.resolve()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small generated corpus in three tar shards: 300 good images of 16x16 pixels in four classes, as a brace pattern."""
    folder = tmp_path_factory.mktemp("scenes")
    write_corpus(folder, num_images=300, num_shards=3, side=16)
    return str(folder / "scenes-{000000..000002}.tar")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> Path:
    """A tiny two-level tokenizer that has seen a few batches: its codes vary, which is all that is asked of it."""
    torch.manual_seed(0)
    model = tokenizer.from_preset(
        "rgb32",
        size=16,
        codebook_size=32,
        code_dim=8,
        hidden_dim=16,
        residual_dim=8,
        num_residual_blocks=1,
        start_step=1,
    )
    step = tokenizer.TokenizerStep(model)
    samples = [sample for shard in plan_corpus(scenes).shards for sample in read_samples(shard)][:64]
    preprocessing = Preprocessing(size=16, channels=3)
    images = torch.from_numpy(np.stack([decode_sample(sample, preprocessing).pixels for sample in samples]))
    for number in range(3):
        output = step.train()({"images": images})
        step.update(output.sums, output.pools, torch.Generator().manual_seed(number))
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(model.eval(), folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray with two CPUs for all tests that need it in this process."""
    with ray_cluster(2):
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, scenes: str, tokenizer_folder: Path, ray_session: None) -> Path:
    """The codes of `scenes` as one quiet worker makes them: 300 rows in Zarr shards of 20."""
    out = tmp_path_factory.mktemp("reference") / "codes.zarr"
    options = TokenizeOptions(size=16, rows_per_shard=20)
    tokenize_corpus(plan_corpus(scenes), tokenizer.load(tokenizer_folder), out, options, lambda done, total, note: None)
    return out


LPIPS_CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


@pytest.fixture(scope="session")
def published_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with alex.pth and vgg.pth as the package lpips ships them, and the networks' own weights in checkpoints/."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    for name, channels in LPIPS_CHANNELS.items():
        linear = {f"lin{place}.model.1.weight": torch.rand(1, number, 1, 1) for place, number in enumerate(channels)}
        torch.save(linear, folder / f"{name}.pth")
    for build, file in (
        (torchvision.models.alexnet, "alexnet-owt-7be5be79.pth"),
        (torchvision.models.vgg16, "vgg16-397923af.pth"),
    ):
        with torch.device("meta"):
            shapes = build(weights=None).features.state_dict()
        values = {
            f"features.{name}": torch.randn(value.shape) / max(1, value[0].numel()) ** 0.5
            for name, value in shapes.items()
        }
        torch.save(values, folder / "checkpoints" / file)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of pt_inception-2015-12-05-6726825d.pth."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.manual_seed(0)
    torch.save(Inception3(1008, aux_logits=False, init_weights=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """The networks of tokenizer/published.py, which tests in several folders import."""
    spec = importlib.util.spec_from_file_location("published", Path(__file__).parent / "tokenizer" / "published.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
