"""Corpora in a bucket of a real S3 server: the same samples as on a disk, few requests, faults told apart, and no secret told."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.exceptions import GenericError

import tokenizer
import vqmill
from pipelines.cli import app
from pipelines.corpus import CorpusError, Preprocessing, Reason, list_samples, load_sample, objects, plan_corpus
from pipelines.corpus.named_classes import CLASSES_FILE
from pipelines.corpus.objects import BucketLost, RemoteObject
from pipelines.corpus.plan import Plan
from pipelines.corpus.samples import REQUESTS, RawSample, read_samples
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed
from pipelines.scenes import write_corpus
from vqmill.errors import UsageError


def samples(plan: Plan) -> list[RawSample]:
    return [sample for shard in plan.shards for sample in read_samples(shard)]


def loaded(plan: Plan) -> list[RawSample]:
    return [load_sample(shard, ref) for shard in plan.shards for ref in list_samples(shard)]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Path and range of every `obstore.get` from now on, but for the one that asks for names of classes."""
    asked: list[Any] = []
    original = obstore.get

    def get(store: Any, path: str, *, options: Any = None) -> Any:
        if path != CLASSES_FILE:
            asked.append((path, options and options["range"]))
        return original(store, path, options=options)

    monkeypatch.setattr(obstore, "get", get)
    return asked


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def require_same(there: Plan, here: Plan) -> None:
    assert [(shard.name, shard.num_samples, shard.num_bytes, shard.kind) for shard in there.shards] == [
        (shard.name, shard.num_samples, shard.num_bytes, shard.kind) for shard in here.shards
    ]
    assert (there.class_names, there.skipped, there.unused) == (here.class_names, here.skipped, here.unused)
    assert samples(there) == samples(here) == loaded(there)


def test_loose_images_are_as_on_the_disk(folder: Path, s3: Any, address: str) -> None:
    for name in ("cat/ü b.png", "cat/50%25.png", "dog/x#1.png", "dog/q?.png", ".git/x.png", "dog/.hidden.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "cat" / "00.png", folder / name)
    (folder / "cat" / "empty.png").write_bytes(b"")
    s3.upload(folder, address)
    here = plan_corpus(str(folder))
    for corpus in (address, address + "/"):
        require_same(plan_corpus(corpus), here)
    assert here.class_names == ("cat", "dog")
    assert here.num_samples == 29


@pytest.mark.parametrize("named", ["/", "/{000000..000002}.tar", "/*.tar", "/00000[0-2].tar"])
def test_tars_are_as_on_the_disk(shards: Path, s3: Any, address: str, named: str) -> None:
    data = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(data[: len(data) // 2])  # damage is as on the disk, too
    s3.upload(shards, address)
    require_same(plan_corpus(address + named), plan_corpus(str(shards)))


def test_samples_of_many_parts(shards: Path, s3: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 1000)  # less than a member
    s3.upload(shards, address)
    require_same(plan_corpus(address), plan_corpus(str(shards)))


def test_codes_and_tables_are_as_on_the_disk(
    scenes: str, tokenizer_folder: Path, s3: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    encoder = SpanEncoder(packed(tokenizer.load(tokenizer_folder)), Preprocessing(16), Encoding(), "cpu")
    s3.upload(Path(scenes).parent, address)
    here = [span for shard in plan_corpus(scenes).shards for span in encoder.spans(shard)]
    there = [span for shard in plan_corpus(address).shards for span in encoder.spans(shard)]
    for mine, theirs in zip(there, here, strict=True):
        assert mine.samples == theirs.samples
        assert mine.quarantine == theirs.quarantine
        for level, codes in theirs.codes.items():
            np.testing.assert_array_equal(mine.codes[level], codes)


def test_the_digest_knows_sizes_and_states(
    folder: Path, shards: Path, s3: Any, address: str, make_picture: Callable[..., bytes]
) -> None:
    for corpus, name in ((s3.upload(folder, f"{address}/a"), "cat/00.png"), (s3.upload(shards, f"{address}/b"), "000000.tar")):  # fmt: skip
        before = plan_corpus(corpus)
        assert plan_corpus(corpus).digest == before.digest
        source = folder if name.endswith(".png") else shards
        data = (source / name).read_bytes()
        assert plan_corpus(s3.upload(source, f"{corpus}-copy")).digest == before.digest, "wherever it lies"
        other = data.replace(b"picture 0", b"Picture 0") if name.endswith(".tar") else data[:-1] + bytes([data[-1] ^ 1])
        assert len(other) == len(data)
        assert other != data
        s3.put(corpus, name, other)
        after = plan_corpus(corpus)
        assert (after.num_samples, after.num_bytes) == (before.num_samples, before.num_bytes)
        assert after.digest != before.digest
        assert after.cut_at([5]).shards[0].digest != before.cut_at([5]).shards[0].digest
    s3.put(f"{address}/a", "cat/00.png", make_picture(0, 40))
    assert plan_corpus(f"{address}/a").digest != plan_corpus(f"{address}/a-copy").digest


def test_few_requests(shards: Path, folder: Path, s3: Any, address: str, requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(objects, "PART_BYTES", 10_000)
    s3.upload(shards, f"{address}/tars")
    s3.upload(folder, f"{address}/files")
    (shard, *_) = plan = plan_corpus(f"{address}/tars").shards
    parts = sum(-(-shard.num_bytes // 10_000) for shard in plan)
    assert len(requests) == parts, "planning goes through each part once"
    requests.clear()
    refs = list(list_samples(shard))
    assert [load_sample(shard, ref).problem for ref in refs] == [None] * 10
    assert len(requests) == -(-shard.num_bytes // 10_000), "what was listed just now is not fetched again"
    objects.open_object.cache_clear()
    requests.clear()
    assert load_sample(shard, refs[3]) == samples(plan_corpus(str(shards)))[3]
    assert len(requests) == 1, "one sample is one request"
    requests.clear()
    assert len(samples(plan_corpus(f"{address}/files"))) == len(requests) == 24


def test_the_whole_tar_is_never_held(shards: Path, s3: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 1024)
    s3.upload(shards, address)
    data = (shards / "000000.tar").read_bytes()
    plan_corpus(address)
    (found, *_) = objects.list_objects(address)
    remote = RemoteObject(f"{address}/000000.tar", found.num_bytes, found.etag, 5)
    stream, most = remote.stream(), 0
    with stream:
        for start in range(0, len(data), 700):
            assert stream.read(700) == data[start : start + 700]
            most = max(most, len(remote._parts))
    assert most == 5 < len(data) // 1024
    assert remote.pread(700, 5000) == data[700:5700]
    assert remote.pread(len(data) - 10, 10) == data[-10:]
    assert remote.pread(3, 0) == b""


def test_large_members_that_nobody_asked_for_are_skipped(
    tmp_path: Path, s3: Any, address: str, requests: list[Any], make_picture: Callable[..., bytes]
) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (("a.png", make_picture(1)), ("a.mp4", bytes(60 << 20)), ("b.png", make_picture(2))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    s3.put(address, "x.tar", file.getvalue())
    assert [sample.key for sample in samples(plan_corpus(f"{address}/x.tar"))] == ["a", "b"]
    assert sum(stop - start for _, (start, stop) in requests) < 2 * 25e6


def test_requests_overlap(folder: Path, s3: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.upload(folder, address)
    together = threading.Barrier(REQUESTS)
    original = obstore.get

    def get(*arguments: Any, **options: Any) -> Any:
        together.wait(timeout=10)  # breaks unless so many are under way
        return original(*arguments, **options)

    plan = plan_corpus(address)
    assert plan.num_samples == 3 * REQUESTS
    monkeypatch.setattr(obstore, "get", get)
    assert all(sample.problem is None for sample in samples(plan))


def test_what_changes_behind_the_plan_becomes_rows(folder: Path, shards: Path, s3: Any, address: str) -> None:
    files, tars = plan_corpus(s3.upload(folder, f"{address}/a")), plan_corpus(s3.upload(shards, f"{address}/b"))
    refs = list(list_samples(tars.shards[1]))
    s3.delete(f"{address}/a", "cat/00.png")
    s3.put(f"{address}/a", "cat/02.png", (folder / "cat" / "04.png").read_bytes())
    s3.put(f"{address}/b", "000001.tar", (shards / "000000.tar").read_bytes())
    s3.delete(f"{address}/b", "000002.tar")
    objects.open_object.cache_clear()
    found = samples(files)
    assert [(sample.key, sample.problem and sample.problem.detail) for sample in found][:3] == [
        ("cat/00", "no such object"), ("cat/02", "the object has changed since the corpus was planned"), ("cat/04", None),
    ]  # fmt: skip
    assert sum(sample.problem is not None for sample in found) == 2
    found = samples(tars)
    assert len(found) == 30
    assert [sample.problem and sample.problem.reason for sample in found] == [None] * 10 + [Reason.UNREADABLE] * 20
    again = load_sample(tars.shards[1], refs[0]).problem
    assert again is not None
    assert again.detail == "the object has changed since the corpus was planned"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("s3://corpora/nothing/", "no sample in it"),
        ("s3://nobucket/photos/", r"s3://nobucket/photos/: cannot be listed: no such bucket\. Correct the address"),
        ("s3://corpora/x.tar", "1 of 1 objects are missing, such as s3://corpora/x.tar"),
        ("s3://corpora/{0..2}.tar", "3 of 3 objects are missing"),
        ("s3://corpora/none-*.tar", r"nothing matches s3://corpora/none-\*\.tar"),
        ("s3://corpora/*.tgz", "nothing matches"),
        ("s3://corpora/{a,b}.jpg", r"s3://corpora/a\.jpg is not a \.tar"),
        ("file:///tmp/x", "without file://"),
    ],
)
def test_errors_say_what_to_do(s3: Any, corpus: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        plan_corpus(corpus)


def test_a_fault_of_one_object_is_a_row_and_of_all_an_error(
    folder: Path, s3: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_corpus(s3.upload(folder, address))
    original = obstore.get

    def get(store: Any, path: str, *, options: Any = None) -> Any:
        if path == "cat/04.png":
            raise GenericError(
                "GET http://h/x?X-Amz-Signature=abc in 3ms - status code: 500 Internal Server Error: <x>"
            )
        return original(store, path, options=options)

    monkeypatch.setattr(obstore, "get", get)
    bad = [sample for sample in samples(plan) if sample.problem]
    assert [(sample.key, sample.problem.detail) for sample in bad if sample.problem] == [
        ("cat/04", "the server answers 500 Internal Server Error")
    ]
    gone = obstore.store.from_url("s3://corpora", endpoint="http://127.0.0.1:9", client_options={"allow_http": True}, retry_config={"max_retries": 1})  # pyright: ignore  # fmt: skip
    monkeypatch.setattr(objects, "_store", lambda address: gone)
    with pytest.raises(BucketLost, match=rf"{address}/cat/00\.png: cannot be had: the server cannot be reached; nor can") as lost:  # fmt: skip
        samples(plan)
    assert lost.value.__suppress_context__ or lost.value.__context__ is None
    with pytest.raises(CorpusError, match="cannot be listed: the server cannot be reached"):
        plan_corpus(address)


class _Files(BaseHTTPRequestHandler):
    """A web server that knows ranges."""

    content: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        data = self.content.get(self.path)
        self.send_response(404 if data is None else 206 if "Range" in self.headers else 200)
        body = data or b""
        if "Range" in self.headers and data:
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            body = data[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Last-Modified", "Sat, 01 Jan 2022 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_tars_of_a_web_server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    content = {f"/x/{path.name}": path.read_bytes() for path in shards.iterdir()}
    handler = type("Handler", (_Files,), {"content": content})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = plan_corpus(f"http://127.0.0.1:{server.server_port}/x/{{000000..000002}}.tar")
        require_same(there, plan_corpus(str(shards)))
        server.shutdown()


@pytest.fixture
def ray() -> Iterator[str]:
    """Ray's folder: its sockets take no long names."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield folder


def test_no_output_holds_a_secret(s3: Any, address: str, tokenizer_folder: Path, tmp_path: Path, ray: str, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    here, out = tmp_path / "scenes", tmp_path / "out"
    write_corpus(here, num_images=40, num_shards=2, side=16)
    (here / "bad").mkdir()
    s3.upload(here, f"{address}/tars")
    environment = os.environ | {"RAY_TMPDIR": ray, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["tokenize", f"{address}/tars/", "--tokenizer", tokenizer_folder, "--out", out / "codes.zarr", "--workers", "1", "--json"]  # fmt: skip
    command = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    logs = [path for path in Path(ray).rglob("*") if path.is_file()]
    assert logs, "Ray's own are searched, too"
    plan = plan_corpus(str(here))
    codes = vqmill.open_codes(out / "codes.zarr")
    assert codes.samples()["key"].to_pylist() == [sample.key for sample in samples(plan)]
    assert codes.labels.tolist() == [sample.label for sample in samples(plan)]

    s3.put(f"{address}/files", "bad.png", b"no image")
    s3.upload(here, f"{address}/files/deep")
    assert run("inspect", f"{address}/files/", "--json") == 3
    assert run("inspect", f"{address}/nothing/", "--json") == 2
    assert run("evaluate", tokenizer_folder, f"{address}/tars/", "--all", "--out", out / "evaluation") == 0
    before = plan_corpus(f"{address}/tars")
    s3.delete(f"{address}/tars", "scenes-000000.tar")
    objects.open_object.cache_clear()
    texts = [done.stdout, done.stderr, repr(before), repr(samples(before)[:20])]
    for bad in (
        f"s3://someone:{s3.secret}@corpora/x/",
        f"s3://corpora/x.tar?X-Amz-Signature={s3.secret}",
        f"https://someone:{s3.secret}@127.0.0.1:9/x.tar",
        f"https://127.0.0.1:9/x.tar?sig={s3.secret}",
        f"s3://corpora/x.tar#{s3.token}",
    ):
        with pytest.raises(UsageError) as error:
            plan_corpus(bad)
        texts.append(str(error.value))
        assert run("tokenize", bad, "--tokenizer", tokenizer_folder, "--out", out / "never.zarr", "--json") == 2
        assert run("evaluate", tokenizer_folder, bad, "--out", out / "never") == 2
        assert run("train-tokenizer", bad, "--out", out / "never") == 2
        assert run("inspect", bad) == 2
    texts += capfd.readouterr()
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 40
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(here)] + logs
    assert {"codes.zarr.run.json", "evaluation.json", "run.json"} <= {path.name for path in written}
    for secret in (s3.key_id, s3.secret, s3.token):
        assert not [text for text in texts if secret in text]
        assert not [path for path in written if secret.encode() in path.read_bytes()]
