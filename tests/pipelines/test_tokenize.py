"""Tokenizing on a real Ray: the same bytes for any number of workers, through every kill, with nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import webdataset

import tokenizer
import vqmill
from pipelines import encoder
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import Encoding, describe_device
from pipelines.errors import RunFailed
from pipelines.fleet import Fleet, Kinds, Machine
from pipelines.foreign import packed
from pipelines.tokenize import TokenizeOptions, TokenizeResult, tokenize_corpus
from pipelines.tokenize_command import next_command
from vqmill.commits import Counts, Cursor
from vqmill.errors import UsageError
from vqmill.layout import group_metadata
from vqmill.spec import LevelSpec
from vqmill.verify import verify_store

OPTIONS = TokenizeOptions(size=16, rows_per_shard=20)  # as the `reference` of conftest.py is made


def quiet(done: int, total: int, note: str) -> None:
    """No display."""


def make(
    corpus: str,
    folder: Path,
    out: Path,
    options: TokenizeOptions = OPTIONS,
    progress: Callable[[int, int, str], None] = quiet,
) -> TokenizeResult:
    return tokenize_corpus(plan_corpus(corpus), tokenizer.load(folder), out, options, progress)


def tree(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }


def test_the_store_holds_what_the_tokenizer_gives(reference: Path, tokenizer_folder: Path, scenes: str) -> None:
    codes = vqmill.open_codes(reference)
    assert verify_store(reference).problems == ()
    assert codes.levels == ("top", "bottom")
    assert codes["bottom"].shape == (300, 4, 4)
    samples = codes.samples()
    assert samples["key"].to_pylist() == [f"{index:06d}" for index in range(300)]
    assert samples["label"].to_pylist() == [index % 4 for index in range(300)] == codes.labels.tolist()
    assert len(np.unique(codes["bottom"][:])) > 8, "the tokenizer of these tests has collapsed"
    model = tokenizer.load(tokenizer_folder)
    import torch

    from pipelines.decode import original_images

    images = original_images(plan_corpus(scenes), codes, range(95, 131), 16, 3)
    again = model.encode(torch.from_numpy(images))
    for level in codes.levels:
        agreement = (again[level].numpy() == codes[level][95:131]).mean()
        assert agreement > 0.999, "batches of another size may round differently, but not more"


@pytest.mark.usefixtures("ray_session")
def test_two_workers_give_the_same_bytes_as_one(
    reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    make(scenes, tokenizer_folder, tmp_path / "codes.zarr", replace(OPTIONS, workers=2))
    assert tree(tmp_path / "codes.zarr") == tree(reference)


@pytest.mark.usefixtures("ray_session")
def test_a_finished_job_does_nothing_and_another_is_refused(
    reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    before = tree(reference)
    result = make(scenes, tokenizer_folder, reference)
    assert (result.rows, result.resumed_rows) == (300, 300)
    for options, difference in (
        (replace(OPTIONS, rows_per_shard=40), "rows_per_shard: there 20, now 40"),
        (replace(OPTIONS, size=32), "preprocessing.size: there 16, now 32"),
        (replace(OPTIONS, encoding=Encoding(batch_size=8)), "tokenizer.batch_size: there 32, now 8"),
    ):
        with pytest.raises(UsageError, match=difference):
            make(scenes, tokenizer_folder, reference, options)
    with pytest.raises(UsageError, match="plan: there"):
        make(scenes.replace("{000000..000002}", "000000"), tokenizer_folder, reference)
    assert tree(reference) == before


def actor_pids(*, at_work: bool = False) -> list[int]:
    """Processes of encoder actors: Ray names them so, and what they do."""
    name = b"ray::EncoderActor.encode" if at_work else b"ray::EncoderActor"
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command.startswith(name):
                found.append(int(folder.name))
    return found


@pytest.mark.usefixtures("ray_session")
def test_killed_actors_cost_nothing_and_no_sample_is_blamed(
    reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Three times: two actors that read the same samples, and then one more."""
    killed: list[int] = []

    def kill_next() -> None:
        deadline = time.monotonic() + 60
        while not (new := [pid for pid in actor_pids(at_work=True) if pid not in killed]):
            assert time.monotonic() < deadline, "no actor is running"
            time.sleep(0.01)
        os.kill(new[0], signal.SIGKILL)
        killed.append(new[0])

    def kill_two() -> None:
        kill_next()
        kill_next()

    two = Thread(target=kill_two)

    def kill(done: int, total: int, note: str) -> None:
        if two.ident is None:  # no actor is there yet
            two.start()
        elif done and len(killed) == 2:
            kill_next()

    result = make(scenes, tokenizer_folder, tmp_path / "codes.zarr", progress=kill)
    two.join()
    assert (len(killed), result.counts.quarantined) == (3, 0)
    assert tree(tmp_path / "codes.zarr") == tree(reference)


@pytest.mark.usefixtures("ray_session")
def test_an_input_shard_that_keeps_killing_its_actor_is_named(
    scenes: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import remote
    from pipelines.remote import EncoderActor

    class Deadly:
        @staticmethod
        def options(**options: Any) -> Any:
            import ray

            @ray.remote(max_restarts=0)
            class Dies:
                def __init__(self, *arguments: Any) -> None:
                    pass

                def describe(self, corpus: Path) -> Machine:
                    return Machine("here", describe_device("cpu"), corpus.exists())

                def encode(self, shard: Any, first_span: int, stop_span: int, careful: bool) -> Any:
                    os._exit(9)
                    yield

            return Dies.options(num_cpus=0)

    assert EncoderActor is not None
    monkeypatch.setattr(remote, "EncoderActor", Deadly)
    with pytest.raises(
        RunFailed, match=r"scenes-000000\.tar \(number 0\) killed its worker 3 times, at samples 0\.\.255"
    ):
        make(scenes, tokenizer_folder, tmp_path / "codes.zarr")


def test_an_input_shard_that_ends_early_stops_the_job(scenes: str) -> None:
    from pipelines.spans import _Range, _Running
    from pipelines.watch import Watch

    plan, fleet = plan_corpus(scenes), Fleet(lambda: None, Kinds("cpu", print))
    unwatched = Watch(plan.shards, Counts(), plan.num_samples, lambda seen: 0, quiet, lambda line: None)
    shards = (*plan.shards[:2], replace(plan.shards[2], num_samples=101))
    stretch = _Range(shards, [], {}, fleet, 4, Cursor(), 3, {}, unwatched)
    stretch.seen[2] = 100
    with pytest.raises(RunFailed, match="gave 100 samples, 101 were planned"):
        stretch._require_whole(_Running(2, None, 1, 1))
    shards = (replace(plan.shards[0], num_samples=600),)
    stretch = _Range(shards, [], {}, fleet, 4, Cursor(0, 1), 1, {0: 2}, unwatched)
    stretch.seen[0] = 256
    stretch._require_whole(_Running(0, None, 2, 2))


def test_an_input_shard_is_encoded_from_one_span_to_another(
    scenes: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "SPAN_SAMPLES", 40)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    made = encoder.SpanEncoder(
        packed(tokenizer.load(tokenizer_folder)), Preprocessing(size=16, channels=3), Encoding(), "cpu"
    )
    shard = plan_corpus(scenes).shards[0]
    for first, stop, rows in ((0, None, [40, 40, 20]), (1, 2, [40]), (1, 3, [40, 20]), (2, 9, [20]), (1, 1, [])):
        spans = list(made.spans(shard, first, stop))
        assert [span.index for span in spans] == [first + number for number in range(len(rows))]
        assert [span.samples.num_rows for span in spans] == rows


def bad_corpus(folder: Path) -> str:
    """Two shards: one of good images with bad ones between, one of bad ones only."""
    good = next(iter(plan_images(folder)))
    with webdataset.TarWriter(str(folder / "bad-0.tar")) as tar:
        for index in range(30):
            image = good if index % 3 else good[: len(good) // 2]
            tar.write({"__key__": f"{index:03d}", "png": image, "cls": str(index % 4).encode()})
    with webdataset.TarWriter(str(folder / "bad-1.tar")) as tar:
        for index in range(5):
            tar.write({"__key__": f"text-{index}", "png": b"<html>not found</html>"})
    return str(folder / "bad-{0,1}.tar")


def plan_images(folder: Path) -> list[bytes]:
    import io

    from PIL import Image

    from pipelines.scenes import scene

    buffer = io.BytesIO()
    Image.fromarray(scene("dunes", np.random.default_rng(0), 16)).save(buffer, "PNG")
    return [buffer.getvalue()]


@pytest.mark.usefixtures("ray_session")
def test_bad_samples_become_quarantine_rows(tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes.zarr"
    result = make(bad_corpus(tmp_path), tokenizer_folder, out)
    assert (result.counts.seen, result.counts.encoded, result.counts.quarantined, result.rows) == (35, 20, 15, 20)
    codes = vqmill.open_codes(out)
    quarantine = codes.quarantine()
    assert quarantine["key"].to_pylist() == [f"{index:03d}" for index in range(0, 30, 3)] + [
        f"text-{index}" for index in range(5)
    ]
    assert set(quarantine["reason"].to_pylist()) == {"truncated", "not_an_image"} == set(result.reasons)
    assert codes.samples()["key"].to_pylist() == [f"{index:03d}" for index in range(30) if index % 3]
    assert verify_store(out).problems == ()


@pytest.mark.usefixtures("ray_session")
def test_a_corpus_without_a_good_sample_is_an_empty_store(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = bad_corpus(tmp_path).replace("{0,1}", "1")
    result = make(corpus, tokenizer_folder, tmp_path / "codes.zarr")
    assert (result.rows, result.counts.quarantined) == (0, 5)
    codes = vqmill.open_codes(tmp_path / "codes.zarr")
    assert (len(codes), codes.quarantine().num_rows, list(codes.batches(4))) == (0, 5, [])
    assert verify_store(tmp_path / "codes.zarr").problems == ()


def without_segments(store: Path) -> dict[str, bytes]:
    """The bytes of a store, but for the list of its segments."""
    files = tree(store)
    group = json.loads(files["zarr.json"])
    for key in ("segments", "sha256"):
        del group["attributes"]["vqmill"][key]
    return files | {"zarr.json": json.dumps(group).encode()}


@pytest.mark.usefixtures("ray_session")
def test_a_longer_corpus_is_appended_and_lost_files_are_made_again(
    reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"
    make(scenes.replace("000002}", "000000}"), tokenizer_folder, out)
    with pytest.raises(UsageError, match=r"(?s)plan: there.*begins with the same 100 samples.*vqmill merge"):
        make(scenes.replace("{000000..000002}", "000001"), tokenizer_folder, out)
    result = make(scenes, tokenizer_folder, out, replace(OPTIONS, workers=2))
    assert (result.rows, result.resumed_rows, result.appended_rows) == (300, 100, 200)
    assert without_segments(out) == without_segments(reference)
    spec = vqmill.open_codes(out).spec
    assert [(part.first_row, part.first_commit, part.input_shards, part.num_samples) for part in spec.segments] == [
        (0, 0, 1, 100),
        (100, 5, 3, 300),
    ]
    assert spec.corpus == {**vqmill.open_codes(reference).spec.corpus}

    before = tree(out)
    for name in ("top/c/4/0/0", "label/c/7", "bottom/c/14/0/0"):
        (out / name).unlink()
    (out / "samples/part-000008.parquet").write_bytes(b"cut")
    (out / "zarr.json").write_bytes(group_metadata(replace(spec, complete=False)))
    result = make(scenes, tokenizer_folder, out)
    assert (result.rows, result.resumed_rows, result.appended_rows, result.mended) == (300, 300, 0, (4, 7, 8, 14))
    assert tree(out) == before


def command(corpus: str, folder: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "pipelines.cli", "tokenize", corpus, "--tokenizer", str(folder), "--out", str(out),
        "--shard-rows", "20", "--workers", str(workers), "--json",
    ]  # fmt: skip


def test_killed_jobs_end_as_a_quiet_one(reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes.zarr"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    job = subprocess.Popen(
        command(scenes, tokenizer_folder, out, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("commits/*.json"))) < 5:
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    found = vqmill.open_codes(out, allow_incomplete=True)
    committed = found.spec.num_commits
    assert not found.spec.complete, "the job was too fast to be killed"
    with pytest.raises(vqmill.CodesError, match="unfinished"):
        vqmill.open_codes(out)
    written = {
        path: path.stat().st_mtime_ns
        for path in sorted((out / "bottom" / "c").rglob("*"))[: 3 * committed]
        if path.is_file()
    }
    again = subprocess.run(
        command(scenes, tokenizer_folder, out, 2),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=200,
    )
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout.splitlines()[-1])
    assert report["resumed_rows"] == committed * 20
    assert report["seen"] == report["encoded"] == report["rows"] == 300
    for shard in range(committed):
        path = out / f"bottom/c/{shard}/0/0"
        assert written.get(path) == path.stat().st_mtime_ns, "what was committed was written again"
    assert tree(out) == tree(reference)


def test_the_next_command_is_one_that_takes_the_store() -> None:
    flat, residual = LevelSpec("codes", 9, (2, 2)), LevelSpec("codes", 9, (4, 2, 2), "depth")
    assert next_command(Path("c.zarr"), [flat]) == "vqmill train-prior c.zarr --out DIR"
    assert next_command(Path("c.zarr"), [residual]) == "vqmill inspect c.zarr"
