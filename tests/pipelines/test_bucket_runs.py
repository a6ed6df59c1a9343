"""The commands on stores in an S3 bucket: tokenize on a real Ray, killed, resumed and appended; and what reads its store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vqmill
from pipelines.cli import app
from pipelines.outputs import refuse_inside
from pipelines.tokenize_command import recorded_tokenizer
from vqmill.bucket import Bucket
from vqmill.errors import UsageError
from vqmill.layout import find_spec


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file work, and Ray's session of each: a short name, for Ray's sockets lie in it."""
    return tmp_path_factory.mktemp("b")


def vqmill_command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, words)]


def environment(s3: Any, folder: Path) -> dict[str, str]:
    (folder / "ray").mkdir(exist_ok=True)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return mine | s3.environment | {"RAY_TMPDIR": str(folder / "ray")}


def test_a_killed_and_appended_job_ends_with_the_bytes_of_a_disk_and_tells_no_secret(
    address: str, s3: Any, stores: Any, scenes: str, tokenizer_folder: Path, reference: Path, workplace: Path
) -> None:
    out, surroundings = f"{address}/codes.zarr", environment(s3, workplace)
    shutil.copytree(Path(scenes).parent, workplace / "corpus")
    last = workplace / "corpus" / "scenes-000002.tar"
    last.rename(workplace / "held-back.tar")
    command = vqmill_command(
        "tokenize", workplace / "corpus", "--tokenizer", tokenizer_folder, "--out", out, "--shard-rows", 20, "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    log = (workplace / "log").open("wb")
    job = subprocess.Popen(command, stdout=log, stderr=log, env=surroundings)
    while job.poll() is None and not ((found := find_spec(out)) and found.num_commits >= 2):
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    found = find_spec(out)
    assert found is not None
    assert found.num_commits >= 2
    said = []
    for corpus_is_whole in (False, True):
        if corpus_is_whole:
            (workplace / "held-back.tar").rename(last)
        run = subprocess.run([*command, "--json"], capture_output=True, text=True, env=surroundings, timeout=280)
        assert run.returncode == 0, run.stderr
        said += [run.stdout, run.stderr]
    facts = json.loads(said[2].splitlines()[-1])
    assert (facts["rows"], facts["appended_rows"], facts["out"]) == (300, 100, out)
    made, expected = s3.objects(out), stores.files(reference)
    assert vqmill.open_codes(out).spec.num_rows == 300
    different = {name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name)}
    assert different == {"zarr.json"}, "which names the corpus otherwise, and two segments"
    assert recorded_tokenizer(out) == tokenizer_folder
    log.close()
    everything = {**s3.objects(f"s3://{s3.bucket}"), **stores.files(workplace), "said": "".join(said).encode()}
    assert len([name for name in everything if name.startswith("ray/")]) > 5, "Ray's own logs are among them"
    for name, data in everything.items():
        assert s3.secret.encode() not in data, name


@pytest.fixture
def uploaded(address: str, s3: Any, reference: Path, tokenizer_folder: Path) -> str:
    """A finished store in the bucket, and the record beside it."""
    url = s3.upload(reference, f"{address}/codes.zarr")
    Bucket(address).write("codes.zarr.run.json", json.dumps({"tokenizer": str(tokenizer_folder)}).encode())
    return url


def test_every_reader_takes_an_address(uploaded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> str:
        assert app([*map(str, words), "--json"]) == 0
        return capsys.readouterr().out

    assert '"kind": "store"' in run("inspect", uploaded)
    assert "every checksum, code and row is right" in run("verify", uploaded)
    assert "what is in them was not read" in run("verify", uploaded, "--quick")
    run("decode", uploaded, "--rows", "0:4", "--out", tmp_path / "four.png")
    assert (tmp_path / "four.png").stat().st_size > 100
    run(
        "train-prior",
        uploaded,
        "--out",
        tmp_path / "prior",
        "--preset",
        "pixelcnn-tiny",
        "--steps",
        2,
        "--batch-size",
        4,
        "--device",
        "cpu",
    )
    run("score", tmp_path / "prior", uploaded, "--out", tmp_path / "scores", "--rows", "0:8", "--device", "cpu")
    assert json.loads((tmp_path / "scores" / "score.json").read_bytes())["store"] == uploaded


def test_copies_go_from_and_to_buckets(uploaded: str, address: str, reference: Path, tmp_path: Path) -> None:
    for out in (f"{address}/part.zarr", str(tmp_path / "part.zarr")):
        assert app(["slice", uploaded, "--rows", "10:50", "--out", out]) == 0
        np.testing.assert_array_equal(
            vqmill.open_codes(out)["bottom"][:], vqmill.open_codes(reference)["bottom"][10:50]
        )
    assert app(["slice", uploaded, "--rows", "10:50", "--out", f"{uploaded}/part.zarr"]) == 2


@pytest.mark.parametrize("out", ["{}/codes.zarr", "{}/more/codes.zarr", "{}", "{}/"])
@pytest.mark.parametrize("here", ["s3://b/photos", "S3://b/photos", "s3://b/x/../photos", "s3://b/./ph%6ftos", "s3://b/x/../photos/more"])  # fmt: skip
@pytest.mark.parametrize("source", ["s3://b/photos/", "s3://b/photos", "s3://b"])
def test_outputs_inside_what_is_read_are_refused(out: str, here: str, source: str) -> None:
    with pytest.raises(UsageError, match="lies inside the corpus"):
        refuse_inside(out.format(here), source)


def test_outputs_beside_what_is_read_are_not(tmp_path: Path) -> None:
    for source in ("s3://b/photos", "s3://b/photos/", "gs://b", "s3://other", str(tmp_path)):
        refuse_inside("s3://b/photos-codes.zarr", source)
    refuse_inside(tmp_path / "codes.zarr", "s3://b/photos")
    with pytest.raises(UsageError, match="lies inside the corpus"):
        refuse_inside(f"file://{tmp_path}/codes.zarr", str(tmp_path))


def test_tokenize_refuses_a_store_inside_its_corpus(
    address: str, s3: Any, scenes: str, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.upload(Path(scenes).parent, f"{address}/photos")
    before = s3.objects(address)
    out = f"{address}/photos/codes.zarr"
    assert app(["tokenize", f"{address}/photos/", "--tokenizer", str(tokenizer_folder), "--out", out]) == 2
    assert f"--out {out}: lies inside the corpus" in " ".join(capsys.readouterr().err.split())
    assert s3.objects(address) == before


def test_an_address_that_became_a_path_makes_no_folder(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"s3:/bucket/codes\.zarr: an address .* taken for a path"):
        vqmill.open_codes(Path("s3://bucket/codes.zarr"))
    assert (
        app(["train-prior", str(reference), "--out", "s3://bucket/prior", "--preset", "pixelcnn-tiny", "--steps", "1"])
        == 2
    )
    assert "taken for a path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bucket_without_a_store_is_no_store(s3: Any, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["inspect", f"{address}/nothing.zarr"]) == 2
    assert "a code store" not in capsys.readouterr().out


def test_an_address_that_holds_a_secret_is_recorded_nowhere(
    scenes: str, tokenizer_folder: Path, s3: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"s3://someone:{s3.secret}@{s3.bucket}/secretive.zarr"
    assert app(["tokenize", scenes, "--tokenizer", str(tokenizer_folder), "--out", out, "--json"]) == 2
    printed = capsys.readouterr()
    assert "holds no credentials" in printed.err
    assert s3.secret not in printed.out + printed.err
    assert not any("secretive" in name for name in s3.objects(f"s3://{s3.bucket}"))
