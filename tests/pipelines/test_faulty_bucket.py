"""An S3 server that fails: retried, or told clearly; whatever it does, no store lies, and the same command ends with the same bytes."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vqmill
from pipelines.cli import app
from pipelines.corpus import objects as corpus_objects
from vqmill import bucket as bucket_module
from vqmill import lease as lease_module
from vqmill.layout import find_spec
from vqmill.verify import verify_store
from vqmill.writer import StoreWriter


def _load(name: str) -> Any:
    """A module beside the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


faulty = _load("faulty")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    """Retries as many as ever, but without long pauses; leases that are renewed where a test says so."""
    for name, seconds in {"LEASE_SECONDS": 60.0, "RENEW_SECONDS": 60.0, "LOOK_SECONDS": 0.05}.items():
        monkeypatch.setattr(lease_module, name, seconds)
    pauses = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=50), "base": 2}
    monkeypatch.setattr(bucket_module, "RETRY", {"max_retries": 10, "backoff": pauses})


@pytest.fixture
def server(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The proxy; while it runs, the environment names it."""
    with faulty.faulty_server(s3.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        corpus_objects._store.cache_clear()
        corpus_objects.open_object.cache_clear()
        yield found
    corpus_objects._store.cache_clear()
    corpus_objects.open_object.cache_clear()


def once(number: int, fault: str, wanted: Callable[[str, str], bool]) -> Callable[[str, str], str | None]:
    """Breaks the request `number` of those wanted."""
    met = [0]

    def plan(method: str, path: str) -> str | None:
        if not wanted(method, path):
            return None
        met[0] += 1
        return fault if met[0] == number + 1 else None

    return plan


def conditional(method: str, path: str) -> bool:
    """Whether a request is a put on a condition: to the lease, or to the file that makes all else count."""
    return method == "PUT" and path.endswith((".codes.zarr.lock", "codes.zarr/zarr.json"))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=() if fault in ("500 after", "cut after") else pytest.mark.chaos)
        for fault in faulty.FAULTS
    ],
)
def test_each_conditional_put_may_lose_its_answer(
    fault: str, server: Any, s3: Any, address: str, stores: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The put may have come through, and the client, which has not heard so, must neither give up nor take itself for another."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 8)
    server.plan = lambda method, path: server.broken.append(("", method, path)) if conditional(method, path) else None
    stores.write(f"{address}/whole/codes.zarr", spec, codes)
    expected, puts = s3.objects(f"{address}/whole/codes.zarr"), len(server.broken)
    assert puts >= 3 + 3, "the lease is taken, proven and given back; the store is created, committed to, and finished"
    for number in range(puts):
        server.plan, server.broken = once(number, fault, conditional), []
        url = f"{address}/{number}/codes.zarr"
        stores.write(url, spec, codes)
        assert [broken[0] for broken in server.broken] == [fault]
        assert s3.objects(url) == expected, server.broken
        assert not caplog.records, f"it waited for itself, or took itself for another: {server.broken}"


@pytest.mark.parametrize("fault", ["500 after", "cut after"])
def test_renewals_that_lose_their_answers_are_no_other_job(
    fault: str, server: Any, address: str, stores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, and a whole series, which even asking again does not get through."""
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(bucket_module, "RETRY", {"max_retries": 0})
    url = f"{address}/codes.zarr"
    with StoreWriter(url, stores.two_levels) as writer:
        for faults in (1, 2 * lease_module.PUTS):
            left, honest, server.broken = [fault] * faults, [], []

            def plan(method: str, path: str, left: list[str] = left, honest: list[str] = honest) -> str | None:
                if method == "PUT" and path.endswith(".lock") and not left:
                    honest.append(path)
                return left.pop() if method == "PUT" and path.endswith(".lock") and left else None

            server.plan = plan
            while len(honest) < 3:
                time.sleep(0.02)
                assert writer._hold._thread.is_alive(), server.broken
            assert len(server.broken) == faults
        writer.finish()
    assert find_spec(url).complete


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < 1 else pytest.mark.chaos) for seed in range(12)]
)
def test_a_server_that_often_fails_never_makes_a_store_lie(
    seed: int, server: Any, s3: Any, address: str, stores: Any, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without retries, so that jobs fail: whatever they left opens as what was committed, and the next one goes on."""
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    labels = [None if row % 5 == 4 else row for row in range(21)]
    draw = random.Random(seed)
    gaps = [draw.randint(5, 60)]

    def plan(method: str, path: str) -> str | None:
        gaps[0] -= 1
        if gaps[0]:
            return None
        gaps[0] = draw.randint(5, 60)
        return draw.choice(faulty.FAULTS[:-1])

    server.plan = plan
    monkeypatch.setattr(bucket_module, "RETRY", {"max_retries": 0})
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 0.5)
    url, failures = f"{address}/codes.zarr", []
    while True:
        try:
            stores.write(url, spec, codes, labels)
            break
        except OSError as error:
            failures.append(str(error))
            assert url.rpartition("/")[0] in failures[-1], "it is said where"
            assert s3.secret not in failures[-1]
        with monkeypatch.context() as honest:
            honest.setenv("AWS_ENDPOINT_URL", s3.endpoint)
            if found := find_spec(url):
                read = vqmill.open_codes(url, allow_incomplete=True)
                assert len(read) == found.num_rows
                np.testing.assert_array_equal(read["top"][:], codes["top"][: len(read)])
                assert not verify_store(url).damage
        assert len(failures) < 100, failures[-5:]
    assert server.broken
    server.plan = lambda method, path: None
    assert s3.objects(url) == stores.files(finished_store)


def test_tokenizing_from_and_to_a_server_that_often_fails(
    server: Any, s3: Any, address: str, scenes: str, tokenizer_folder: Path, reference: Path, stores: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """With the retries that everybody has: the job ends well; if not, it says so, and the same command goes on."""
    draw = random.Random(5)
    s3.upload(Path(scenes).parent, f"{address}/corpus")
    server.plan = lambda method, path: draw.choice(faulty.FAULTS) if draw.random() < 0.1 else None
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    surroundings = mine | {"RAY_TMPDIR": str(tmp_path_factory.mktemp("f"))}
    out = f"{address}/codes.zarr"
    words = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "tokenize",
        f"{address}/corpus/",
        "--tokenizer",
        str(tokenizer_folder),
    ]
    words += ["--out", out, "--shard-rows", "20", "--workers", "2", "--device", "cpu"]
    for _ in range(3):
        run = subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=250, check=False)
        if run.returncode == 0:
            break
        assert run.returncode == 1, run.stderr
        assert "To try again: " in run.stderr
    assert run.returncode == 0, run.stderr
    assert {fault for fault, _, _ in server.broken} == set(faulty.FAULTS)
    server.plan = lambda method, path: None
    made, expected = s3.objects(out), stores.files(reference)
    different = {name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name)}
    assert different == {"zarr.json"}, "which names the corpus otherwise"
    assert not verify_store(out).problems


def test_a_server_that_only_fails_ends_the_job_clearly(
    server: Any, address: str, s3: Any, scenes: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    s3.upload(Path(scenes).parent, f"{address}/corpus")
    monkeypatch.setattr(bucket_module, "RETRY", {"max_retries": 1})
    server.plan = lambda method, path: "503"
    for corpus, out, code in ((f"{address}/corpus/", "codes.zarr", 2), (scenes, f"{address}/codes.zarr", 1)):
        assert app(["tokenize", corpus, "--tokenizer", str(tokenizer_folder), "--out", out, "--device", "cpu"]) == code
        said = capsys.readouterr().err
        assert "503" in said
        assert address in said
        assert s3.secret not in said
    server.plan = lambda method, path: None
    assert set(s3.objects(address)) == {f"corpus/scenes-00000{number}.tar" for number in range(3)}
