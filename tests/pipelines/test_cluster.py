"""Tokenizing on a Ray cluster that somebody else started, of two machines (here: two sets of Ray processes on one)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tokenizer
from pipelines.cluster import Crew, Share, _crew, address_to_join
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import Encoding
from pipelines.fleet import Machine
from pipelines.options import ClusterFlags, default_workers
from pipelines.tokenize import TokenizeOptions, store_spec
from pipelines.tokenize_command import tokenize
from vqmill.errors import UsageError
from vqmill.places import place_of
from vqmill.writer import StoreWriter


@dataclass(frozen=True)
class Started:
    """A cluster: where it is, and what lets a driver in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Started]:
    """Two machines of one CPU each, which want a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path may have 107 bytes
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": folder}
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    words += ["--object-store-memory=100000000"]
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for more in (head, [f"--address={address}"]):
            log = Path(folder, f"log-{len(nodes)}")
            with log.open("wb") as output:
                nodes.append(subprocess.Popen([*words, *more], env=environment, stdout=output, stderr=output))
            deadline = time.monotonic() + 120
            while b"Ray runtime started" not in log.read_bytes():
                assert nodes[-1].poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield Started(address, environment)
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def command(corpus: str, folder: Path, out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "pipelines.cli", "tokenize", corpus, "--tokenizer", str(folder), "--out", str(out)]
    return [*words, "--shard-rows", "20", "--json", *more]


def run(
    corpus: str, folder: Path, out: Path, environment: dict[str, str], *more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(corpus, folder, out, *more), capture_output=True, text=True, check=False, env=environment, timeout=250
    )


def tree(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }


def test_a_cluster_that_is_joined_gives_the_same_bytes_and_more_workers_than_it_has_room_for_wait(
    cluster: Started, reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"
    done = run(
        scenes, tokenizer_folder, out, cluster.environment, "--address", cluster.address, "--workers", "3", "--cpus-per-worker", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first.startswith("tokenizing: the Ray cluster")
    assert "2 machines, 2 CPU, 0 GPU; 3 workers of 1 CPU; there is room for 2 now, the others wait" in first
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 300
    assert tree(out) == tree(reference)


def test_a_job_that_is_told_to_stop_says_so_and_goes_on_in_the_cluster_that_ray_address_names(
    cluster: Started, reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"
    job = subprocess.Popen(
        command(scenes, tokenizer_folder, out, "--address", cluster.address),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cluster.environment, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(out.glob("commits/*.json"))) < 3:
        assert job.poll() is None, "the job ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.terminate()  # as `ray job stop`, Slurm and Kubernetes do
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 1, errors
    assert "stopped. Whatever was committed" in errors
    assert json.loads(output.splitlines()[-1]) == {"error": "stopped", "exit_code": 1}

    done = run(scenes, tokenizer_folder, out, cluster.environment | {"RAY_ADDRESS": cluster.address})  # as in a Ray job
    assert done.returncode == 0, done.stderr
    assert "2 machines, 2 CPU, 0 GPU; 2 workers of 1 CPU" in done.stderr.splitlines()[0]
    assert json.loads(done.stdout.splitlines()[-1])["resumed_rows"] >= 40  # the third record may be ahead of zarr.json
    assert tree(out) == tree(reference)


def test_a_cluster_that_is_not_there_is_told_at_once(scenes: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = run(scenes, tokenizer_folder, tmp_path / "codes.zarr", dict(os.environ), "--address", address)
    assert done.returncode == 2
    assert f"the Ray cluster {address} cannot be joined" in done.stderr
    assert "refused" in done.stderr


@pytest.mark.parametrize(
    ("asked", "environment", "address"),
    [
        (None, None, None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("head:6379", "10.0.0.1:6379", "head:6379"),
        ("local", "10.0.0.1:6379", None),
        ("[fd00::1]:6379", None, "[fd00::1]:6379"),
    ],
)
def test_which_cluster_is_joined(
    asked: str | None, environment: str | None, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert address_to_join(asked) == address


def test_addresses_that_no_driver_can_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"(?s)--address ray://head:10001: an address of Ray Client.*ray job submit"):
        address_to_join("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(UsageError, match=r"RAY_ADDRESS=http://head:8265: expected auto or HOST:PORT"):
        address_to_join(None)
    for wrong in ("head", ":6379", "head:port", "http://head:8265"):
        with pytest.raises(UsageError, match="expected auto or HOST:PORT"):
            address_to_join(wrong)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ClusterFlags(cpus_per_worker=0), "--cpus-per-worker must be at least 1, got 0"),
        (ClusterFlags(decode_threads=0), "--decode-threads must be at least 1, got 0"),
        (ClusterFlags(gpus_per_worker=0), "--gpus-per-worker must be above 0"),
        (ClusterFlags(gpus_per_worker=2), "--gpus-per-worker must be .* at most 1"),
        (ClusterFlags(gpus_per_worker=0.5), "it goes with --device cuda"),
    ],
    ids=["cpus", "threads", "no gpu", "two gpus", "gpus of cpus"],
)
def test_shares_that_make_no_sense_are_refused(flags: ClusterFlags, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flags.resolved().check_device("cpu")


def test_a_share_decides_how_many_workers_there_are_and_how_they_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [default_workers("cpu", Share(cpus)) for cpus in (1, 3, 16)] == [8, 2, 1]
    assert [default_workers("cuda", Share(4, gpus)) for gpus in (None, 0.5, 0.1)] == [3, 6, 30]
    assert Share(4, 0.5).on("cuda") == {"CPU": 4, "GPU": 0.5}
    assert Share(4).on("cuda") == {"CPU": 4, "GPU": 1}
    assert Share(4).on("cpu") == {"CPU": 4}
    assert [ClusterFlags().threads, ClusterFlags(cpus_per_worker=4).threads] == [2, 5]
    assert ClusterFlags(cpus_per_worker=4, decode_threads=3).threads == 3


def test_a_dry_run_of_a_cluster_does_not_ask_it(scenes: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    def lines(**flags: Any) -> list[str]:
        return tokenize(
            scenes, tokenizer_folder, tmp_path / "codes.zarr", module=None, size=16, batch_size=32, shard_rows=None, codec="auto",
            precision="fp32", dry_run=True, **flags,
        ).lines  # fmt: skip

    joining = ClusterFlags(address="head:6379")
    unknown = lines(workers=None, device="auto", cluster=joining)
    assert unknown[-1] == (
        "as many workers as there is room for on GPUs or CPUs of the Ray cluster head:6379; nothing was written"
    )
    assert "would take one worker about" in unknown[-2]
    known = lines(workers=7, device="cuda", cluster=joining)  # this machine need not have the GPUs
    assert known[-1] == "7 workers on cuda of the Ray cluster head:6379; nothing was written"


@pytest.mark.usefixtures("ray_session")
def test_flags_reach_the_workers(
    scenes: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from pipelines import remote
    from pipelines.tokenize import _fleet

    asked: dict[str, Any] = {}

    class Asked:
        @staticmethod
        def options(**options: Any) -> Any:
            asked.update(options)
            return Asked

        @staticmethod
        def remote(*arguments: Any) -> Any:
            asked["arguments"] = arguments
            return ray.remote(Idle).options(num_cpus=0).remote()

    class Idle:
        def describe(self, corpus: Path) -> Machine:
            return Machine("here", "cpu", True)

    monkeypatch.setattr(remote, "EncoderActor", Asked)
    plan, model = plan_corpus(scenes), tokenizer.load(tokenizer_folder)
    flags = ClusterFlags(cpus_per_worker=3, gpus_per_worker=0.5, decode_threads=7)
    options = TokenizeOptions(size=16, encoding=Encoding(compiled=True), cluster=flags)
    crew = Crew(1, "cuda", flags.share.on("cuda"), True, "")
    with StoreWriter(tmp_path / "codes.zarr", store_spec(plan, model, options)) as writer:
        _fleet(plan, model, writer, options, crew).start()
    assert (asked["num_cpus"], asked["num_gpus"]) == (3, 0.5)
    assert asked["arguments"][2:] == (Encoding(compiled=True), "cuda", 7, 60)
    assert asked["runtime_env"]["env_vars"]["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.usefixtures("ray_session")
def test_a_folder_is_written_on_this_machine_which_others_need_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from pipelines import remote
    from pipelines.remote import RayHands

    asked: list[Any] = []

    class Asked:
        @staticmethod
        def options(scheduling_strategy: Any) -> None:
            asked.append(scheduling_strategy)

    monkeypatch.setattr(remote, "write_remotely", Asked)
    RayHands(place_of(tmp_path))
    assert (asked[0].node_id, asked[0].soft) == (ray.get_runtime_context().get_node_id(), False)
    RayHands(place_of("s3://bucket/codes.zarr"))
    assert asked[1] == "DEFAULT"


class FakeRay:
    """What `_crew` asks of Ray, on machines that this one is not."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = machines
        self.gcs_address = "head:6379"

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": has} for has in self.machines]

    def cluster_resources(self) -> dict[str, float]:
        return {kind: sum(has.get(kind, 0) for has in self.machines) for kind in ("CPU", "GPU")}

    def get_runtime_context(self) -> FakeRay:
        return self


def test_workers_are_counted_machine_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def crew(fake: FakeRay, workers: int | None, device: str, share: Share, address: str | None = "head:6379") -> Crew:
        monkeypatch.setitem(sys.modules, "ray", fake)
        return _crew(workers, device, share, address)

    cpus = FakeRay({"CPU": 4}, {"CPU": 4})
    assert crew(cpus, None, "auto", Share(3)).workers == 2  # not 8 // 3 on the two of them
    assert "room for 2 now" in crew(cpus, 5, "auto", Share(3)).summary
    assert crew(cpus, None, "auto", Share(5)).workers == 1  # waits for a larger machine
    gpus = FakeRay({"CPU": 16}, {"CPU": 16, "GPU": 2})
    made = crew(gpus, None, "auto", Share(2, 0.5))
    assert (made.device, made.workers, made.resources) == ("cuda", 4, {"CPU": 2, "GPU": 0.5})
    assert crew(cpus, None, "auto", Share(1, 0.5)).device == "cuda"  # to come, when the cluster grows
    assert crew(gpus, None, "cpu", Share(4)).workers == 8
    with pytest.raises(UsageError, match=r"--workers 3: there is room for 2, with 3 CPU for each"):
        crew(cpus, 3, "cpu", Share(3), None)
