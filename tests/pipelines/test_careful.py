"""Decoders that die, hang or eat memory cost one sample each, which is named; nothing else changes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokenizer
import vqmill
from pipelines import careful, encoder
from pipelines.careful import CarefulDecoder
from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Decoded, Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.problems import BadImage, Problem, Reason
from pipelines.corpus.samples import RawSample
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.errors import RunFailed
from pipelines.foreign import packed
from vqmill.verify import verify_store

PREPROCESSING = Preprocessing(16)


def png(number: int, mark: str = "") -> bytes:
    """An image that decodes anywhere; where `poison` is at work, not when it is marked."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue() + (f"POISON:{mark}".encode() if mark else b"")


@pytest.fixture
def poison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of processes that are started from now on fail on marked files."""
    (site := tmp_path / "site").mkdir()
    shutil.copy(Path(__file__).with_name("poison_site.py"), site / "sitecustomize.py")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))


def samples(images: Sequence[bytes | np.ndarray]) -> list[RawSample]:
    return [RawSample(f"{index}", "x.tar", index, image) for index, image in enumerate(images)]


def outcomes(decoder: CarefulDecoder, given: Sequence[RawSample]) -> list[Decoded | BadImage]:
    found = list(decoder.outcomes(iter(given)))
    assert [sample for sample, _ in found] == list(given)
    return [outcome for _, outcome in found]


def said(outcome: Decoded | BadImage) -> str | tuple[bytes, int, int, str]:
    if isinstance(outcome, BadImage):
        return str(outcome)
    return outcome.pixels.tobytes(), outcome.width, outcome.height, outcome.kind


def directly(sample: RawSample) -> str | tuple[bytes, int, int, str]:
    try:
        return said(decode_sample(sample, PREPROCESSING))
    except BadImage as problem:
        return said(problem)


@pytest.mark.usefixtures("poison")
def test_what_kills_or_hangs_its_process_is_named_and_nothing_else() -> None:
    died = "crashed: the process that decoded it died, 3 times and alone in it"
    hung = "timed_out: decoding it took longer than 1 s, 3 times and alone"
    expected = {
        "segfault": died,
        "abort": died,
        "exit": died,
        "kill": died,
        "memory": "out_of_memory: PNG: decoding it took more memory than there was for it",
        "sleep": hung,
        "hold": hung,
    }
    good = samples([png(number) for number in range(30)])
    broken = samples([b"", b"<html>", png(0)[:300], np.full((20, 30), 7, np.uint8)])
    told = RawSample("told", "x.tar", 0, problem=Problem(Reason.BAD_LABEL, "7.5"))
    poisoned = samples([png(number, mark) for number, mark in enumerate(expected)])
    with CarefulDecoder(PREPROCESSING, 1) as decoder:
        mixed = [*good[:20], *poisoned, *good[20:], *broken, told]
        found = [said(outcome) for outcome in outcomes(decoder, mixed)]
    assert found[20:27] == list(expected.values())
    assert found[:20] + found[27:] == [directly(sample) for sample in (*good, *broken, told)]
    assert found[-1] == "bad_label: 7.5"


@pytest.mark.usefixtures("poison")
def test_three_deaths_alone_are_a_verdict_and_fewer_are_not(tmp_path: Path) -> None:
    marks = [f"first {times} {tmp_path}/{times}" for times in (1, 3, 4)]
    with CarefulDecoder(PREPROCESSING, 30) as decoder:
        found = [outcomes(decoder, samples([png(0, mark), png(1)])) for mark in marks]
    assert [isinstance(poisoned, Decoded) for poisoned, _ in found] == [True, True, False]
    assert all(isinstance(neighbour, Decoded) for _, neighbour in found)
    assert [(tmp_path / times).stat().st_size for times in "134"] == [2, 4, 4]


def test_files_share_a_process_while_they_are_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(careful, "TOGETHER_BYTES", 2500)
    small, large, picture = (
        samples([png(0)])[0],
        samples([png(0).ljust(2500)])[0],
        samples([np.zeros((9, 9), np.uint8)])[0],
    )
    given = [*[small] * 5, large, large, *[picture] * 20, small]
    assert [len(sample.image) // 100 for sample in (small, large) if isinstance(sample.image, bytes)] == [8, 25]
    asked: list[int] = []
    with CarefulDecoder(PREPROCESSING, 30) as decoder:
        ask = decoder._ask
        monkeypatch.setattr(decoder, "_ask", lambda files: (asked.append(len(files)), ask(files))[1])
        assert [said(outcome) for outcome in outcomes(decoder, given)] == [directly(sample) for sample in given]
    assert asked == [3, 3, 1, 1]


def test_a_helper_that_is_killed_is_no_samples_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    good = samples([png(number) for number in range(3)])
    with CarefulDecoder(PREPROCESSING, 30) as decoder:
        for _ in range(2):
            os.kill(decoder._helper.pid, signal.SIGKILL)
            assert [said(outcome) for outcome in outcomes(decoder, good)] == [directly(sample) for sample in good]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with CarefulDecoder(PREPROCESSING, 30) as decoder, pytest.raises(RunFailed, match="helper process ended 3 times"):
        outcomes(decoder, good)


DEADLINES = """
import ctypes, threading, time
from pipelines.deadlines import Deadlines
deadlines = Deadlines()
with deadlines.within(60), deadlines.within(0.5):
    pass
with deadlines.within(60):
    time.sleep(0.6)
time.sleep(0.1)
def too_long():
    with deadlines.within(0.5):
        time.sleep(30)
threading.Thread(target=too_long).start()
print("lives", flush=True)
with deadlines.within(60):
    pass
ctypes.PyDLL(None).sleep(30)
"""


def test_a_step_that_takes_too_long_ends_its_process() -> None:
    ended = subprocess.run([sys.executable, "-c", DEADLINES], capture_output=True, text=True, timeout=25, check=False)
    assert (ended.stdout, ended.returncode) == ("lives\n", -signal.SIGALRM), ended.stderr


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "SPAN_SAMPLES", 40)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)


@pytest.mark.usefixtures("small_spans")
def test_careful_spans_are_the_same_spans(scenes: str, tokenizer_folder: Path) -> None:
    made = SpanEncoder(packed(tokenizer.load(tokenizer_folder)), PREPROCESSING, Encoding(), "cpu")
    shard = plan_corpus(scenes).shards[0]
    for first, stop in ((0, None), (1, 2), (2, 9)):
        usual, careful = (list(spans(shard, first, stop)) for spans in (made.spans, made.careful_spans))
        assert [span.index for span in careful] == [span.index for span in usual]
        for one, other in zip(usual, careful, strict=True):
            assert (one.samples, one.quarantine) == (other.samples, other.quarantine)
            assert {level: values.tobytes() for level, values in one.codes.items()} == {
                level: values.tobytes() for level, values in other.codes.items()
            }


@pytest.mark.usefixtures("small_spans")
def test_decoding_and_encoding_have_their_limits(scenes: str, tokenizer_folder: Path) -> None:
    limits: list[float] = []

    @contextmanager
    def within(seconds: float):
        limits.append(seconds)
        yield

    made = SpanEncoder(
        packed(tokenizer.load(tokenizer_folder)), PREPROCESSING, Encoding(16), "cpu", sample_timeout=7, within=within
    )
    assert len(list(made.spans(plan_corpus(scenes).shards[0]))) == 3
    assert sorted(limits) == [7] * 100 + [7 * 16] * (3 + 3 + 2 + 3), "each image, each batch, and fetching each span"


# Of three spans; where one that dies and one that hangs come together, only the first is met before careful mode.
POISONED = {3: "segfault", 70: "abort", 200: "memory", 201: "sleep", 300: "exit", 301: "kill", 590: "hold"}


def write_tar(path: Path, image: Callable[[int], bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(600):
            data = image(index)
            member = tarfile.TarInfo(f"{index:03d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


SEVERAL_COMMANDS = """
import json, sys
from pipelines.cli import app
from pipelines.cluster import ray_cluster
with ray_cluster(1):
    print([app(words) for words in json.loads(sys.argv[1])])
"""


@pytest.mark.usefixtures("poison")
def test_a_job_finds_poisoned_samples_and_goes_on(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Against the store of a corpus in which the same samples are merely broken; then most of them are good and tried again."""
    marked = {index: png(index, mark) for index, mark in POISONED.items()}
    harmless = {index: data.replace(b"POISON", b"NOTHIN") for index, data in marked.items() if index not in (3, 201)}
    broken = {index: b"\0" * len(data) for index, data in marked.items()}
    commands = []
    for name, special, store, *more in (
        ("broken", broken, "expected.zarr"),
        ("poisoned", marked, "codes.zarr"),
        ("restored", marked | harmless, "codes.zarr", "--retry-quarantined"),
    ):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", lambda index, special=special: special.get(index, png(index)))
        settings = [
            "--tokenizer",
            str(tokenizer_folder),
            "--shard-rows",
            "100",
            "--sample-timeout",
            "3",
            "--workers",
            "1",
        ]
        commands.append(["tokenize", str(tmp_path / name), "--out", str(tmp_path / store), *settings, *more, "--json"])
    job = subprocess.run(
        [sys.executable, "-c", SEVERAL_COMMANDS, json.dumps(commands)],
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    *printed, ended = job.stdout.splitlines()
    assert ended == "[3, 3, 3]", job.stderr
    _, first, second = (json.loads(line) for line in printed if line.startswith("{"))
    assert (first["encoded"], first["quarantined"]) == (593, 7)
    assert first["reasons"] == {"crashed": 4, "out_of_memory": 1, "timed_out": 2}
    assert (second["retried"], second["encoded"]) == (7, 598)
    assert second["reasons"] == {"crashed": 1, "timed_out": 1}

    codes, expected = (vqmill.open_codes(tmp_path / name) for name in ("codes.zarr", "expected.zarr"))
    for level in codes.levels:
        assert (codes[level][:593] == expected[level][:]).all()
    assert codes.samples(0, 593) == expected.samples()
    assert codes.sample_keys()[593:] == ["070", "200", "300", "301", "590"]
    lines, others = codes.quarantine(history=True), expected.quarantine()
    assert lines.slice(0, 7).drop_columns(["reason", "detail"]) == others.drop_columns(["reason", "detail"])
    assert lines.slice(7) == codes.quarantine() == lines.take([0, 3]), "what is found again is told in the same words"
    assert verify_store(tmp_path / "codes.zarr").problems == ()
