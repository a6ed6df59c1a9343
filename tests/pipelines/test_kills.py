"""Processes and whole nodes that die at random moments: the same command, given again, makes the bytes of an undisturbed run.

`make test-chaos` kills a hundred times and more (VQMILL_CHAOS_KILLS in the jobs on a cluster). The seed of what is killed when is printed;
VQMILL_CHAOS_SEED sets it.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import vqmill
from pipelines.scenes import write_corpus
from vqmill.layout import find_spec
from vqmill.verify import verify_store

HERE = Path(__file__).parent
SEED = int(os.environ.get("VQMILL_CHAOS_SEED", random.SystemRandom().randrange(1_000_000)))
KILLS = int(os.environ.get("VQMILL_CHAOS_KILLS", "100"))
NODES, KILLS_OF_A_JOB = 2, 12
GOOD, BAD = 1800, 30


def tree(store: Path) -> dict[str, bytes]:
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def kill(process: int) -> bool:
    """Kills it; False when it has ended by itself."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Nodes:
    """A cluster of NODES nodes with two CPU slots each, in a process of its own (cluster_main.py)."""

    def __init__(self, folder: Path, tokenizer_folder: Path) -> None:
        token = secrets.token_hex(32)
        mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = mine | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_TMPDIR": str(folder),
            "RAY_worker_niceness": "0",
            "RAY_max_direct_call_object_size": "1000",  # as with large codes, spans lie on the node that made them
            "VQMILL_TEST_TOKENIZER": str(tokenizer_folder),
        }
        self._log = (folder / "cluster.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "cluster_main.py"), str(NODES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=self.environment,
        )  # fmt: skip
        self._hear()

    def _hear(self) -> None:
        assert self._process.stdout
        found = json.loads(self._process.stdout.readline() or "{}")
        assert found, Path(self._log.name).read_text()
        self.address, self.raylets = found["address"], found["raylets"]

    def lose(self, number: int) -> None:
        """One node dies, and another one joins."""
        assert self._process.stdin
        self._process.stdin.write(f"lose {number}\n")
        self._process.stdin.flush()
        self._hear()

    def processes(self, *names: str) -> list[int]:
        """Processes of the nodes that Ray calls so."""
        found = []
        for raylet in self.raylets:
            for child in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
                try:
                    command = Path(f"/proc/{child}/cmdline").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if command.startswith(tuple(f"ray::{name}" for name in names)):
                    found.append(int(child))
        return found

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._log.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Iterator[Nodes]:
    found = Nodes(tmp_path_factory.mktemp("c"), tokenizer_folder)  # a short name, for Ray's sockets lie in it
    yield found
    found.close()


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tars of several spans each, and one in which every third image is no image."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_images=GOOD, num_shards=5, side=16)
    with webdataset.TarWriter(str(folder / "some-bad.tar")) as tar:
        for index in range(3 * BAD):
            tar.write({"__key__": f"{index:03d}", "png": png(index) if index % 3 else b"no image"})
    return folder


def start(nodes: Nodes, corpus: Path, out: Path, workers: int, shard_rows: int = 128) -> subprocess.Popen[bytes]:
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "driver_main.py"), nodes.address, "tokenize", str(corpus),
             "--tokenizer-module", "slow_tokenizer:make", "--out", str(out), "--shard-rows", str(shard_rows), "--workers", str(workers), "--device", "cpu"],
            env=nodes.environment, stdout=log, stderr=log, cwd=HERE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def quiet(nodes: Nodes, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the store that one undisturbed worker makes."""
    out = tmp_path_factory.mktemp("quiet") / "codes.zarr"
    assert start(nodes, corpus, out, 1).wait(280) == 3
    codes = vqmill.open_codes(out)
    assert (len(codes), codes.quarantine().num_rows) == (GOOD + 2 * BAD, BAD)
    return tree(out)


def kill_worker(nodes: Nodes, driver: int, draw: random.Random) -> bool:
    found = nodes.processes("EncoderActor")
    return bool(found) and kill(draw.choice(found))


def kill_writer(nodes: Nodes, driver: int, draw: random.Random) -> bool:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if found := nodes.processes("write_remotely"):
            return kill(draw.choice(found))
        time.sleep(0.002)
    return False


def kill_driver(nodes: Nodes, driver: int, draw: random.Random) -> bool:
    return kill(driver)


def kill_node(nodes: Nodes, driver: int, draw: random.Random) -> bool:
    nodes.lose(draw.randrange(NODES))
    return True


Killer = Callable[[Nodes, int, random.Random], bool]


def disturbed(
    nodes: Nodes, corpus: Path, out: Path, workers: int, killers: Sequence[Killer], draw: random.Random
) -> Counter[str]:
    """Gives the same command until the store is finished; has one thing killed after the other meanwhile."""
    done: Counter[str] = Counter()
    left = list(killers)
    for _ in range(4 * len(killers) + 2):
        driver = start(nodes, corpus, out, workers)
        while draw.random() < 0.97 and driver.poll() is None and not nodes.processes("EncoderActor.encode"):
            time.sleep(0.1)  # most kills come when it encodes, some while it starts
        while driver.poll() is None:
            time.sleep(draw.uniform(0, 2) if left else 0.1)
            if not left or driver.poll() is not None:
                continue
            if left[0](nodes, driver.pid, draw):
                done[left.pop(0).__name__] += 1
            else:  # nothing of the kind was to be found: others first
                left.append(left.pop(0))
        if driver.returncode == 3:
            break
        log = (out.parent / f"{out.name}.log").read_text()
        killed = driver.returncode == -signal.SIGKILL
        assert killed or (driver.returncode == 1 and "To try again" in log), log[-3000:]
        done["started again"] += 1
        if find_spec(out):  # whatever was left can be read as far as it counts
            codes = vqmill.open_codes(out, allow_incomplete=True)
            assert codes["bottom"][:].shape[0] == len(codes) == codes.samples().num_rows
    else:
        raise AssertionError(f"never finished: {done}")
    return done


@pytest.mark.timeout(900)  # on a busy machine, where each start of a process takes long
def test_a_node_a_writer_and_a_driver_die(nodes: Nodes, corpus: Path, quiet: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "codes.zarr"
    done = disturbed(nodes, corpus, out, 2, [kill_node, kill_writer, kill_driver], random.Random(1))
    assert sum(done.values()) - done["started again"] > 1, done
    assert tree(out) == quiet
    assert verify_store(out).problems == ()


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_a_hundred_random_kills(
    nodes: Nodes, corpus: Path, quiet: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, total, job = random.Random(SEED), Counter[str](), 0
    with capsys.disabled():
        print(f"\nVQMILL_CHAOS_SEED={SEED}", flush=True)
    while sum(total.values()) - total["started again"] < KILLS:
        killers = draw.choices([kill_worker, kill_writer, kill_driver, kill_node], [5, 3, 3, 2], k=KILLS_OF_A_JOB)
        out = tmp_path / f"{job}.zarr"
        total += disturbed(nodes, corpus, out, draw.choice([1, 2, 3, 4]), killers, draw)
        with capsys.disabled():
            print(f"job {job}: {dict(total)}", flush=True)
        assert tree(out) == quiet, f"VQMILL_CHAOS_SEED={SEED}, job {job}"
        assert verify_store(out).problems == ()
        job += 1


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_spans_that_are_lost_with_their_node_are_encoded_again_by_the_same_job(
    nodes: Nodes, corpus: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    """One Zarr shard takes all of them, so that none is written when the node dies."""
    out = tmp_path / "codes.zarr"
    driver = start(nodes, corpus, out, 4, shard_rows=4096)
    while sum(len(log.read_text().splitlines()) for log in tmp_path.glob("codes.zarr.runs/*")) < 3:
        assert driver.poll() is None
        time.sleep(0.05)  # three input shards are done, not all by the two workers of one node
    nodes.lose(0)
    assert driver.wait(280) == 3
    assert "encoding again what is not committed" in (tmp_path / "codes.zarr.log").read_text()
    assert verify_store(out).problems == ()
    (whole := tmp_path / "quiet.zarr").mkdir()
    for name, data in quiet.items():
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_bytes(data)
    codes, expected = vqmill.open_codes(out), vqmill.open_codes(whole)
    assert codes.samples() == expected.samples()
    assert codes.quarantine() == expected.quarantine()
    for level in codes.levels:
        assert (codes[level][:] == expected[level][:]).all()


@pytest.mark.chaos
@pytest.mark.parametrize("workers", [2, 4])
def test_other_workers_and_another_order_of_finishing_give_the_same_bytes(
    workers: int, nodes: Nodes, corpus: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    assert start(nodes, corpus, tmp_path / "codes.zarr", workers).wait(280) == 3
    assert tree(tmp_path / "codes.zarr") == quiet


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.chaos)])
def test_a_process_that_writes_dies_at_random_moments(
    kills: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("writer_main", HERE / "writer_main.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(str(tmp_path / "whole.zarr"))
    expected, seed = tree(tmp_path / "whole.zarr"), 1 if kills < 60 else SEED
    draw, done, job = random.Random(seed), 0, 0
    with capsys.disabled():
        print(f"\nVQMILL_CHAOS_SEED={seed}", flush=True)
    while done < kills:
        out = tmp_path / f"{job}.zarr"
        finished, held = False, 0
        while not finished:
            process = subprocess.Popen([sys.executable, str(HERE / "writer_main.py"), str(out)])
            try:
                finished = process.wait(draw.uniform(0.3, 2)) == 0 if done < kills else process.wait(250) == 0
                assert finished
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                if found := find_spec(out):
                    codes = vqmill.open_codes(out, allow_incomplete=True)
                    assert len(codes) == found.num_rows >= held, "committed rows are gone"
                    assert not verify_store(out).damage
                    held = found.num_rows
        assert tree(out) == expected, f"seed {seed}, job {job}"
        job += 1
