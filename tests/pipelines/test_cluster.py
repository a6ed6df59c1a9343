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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tokenizer
import vqmill
from pipelines.cluster import Crew, Share, _crew, address_to_join
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import describe_device
from pipelines.errors import RunFailed
from pipelines.fleet import Fleet, Kinds, Machine
from pipelines.options import ClusterFlags, default_workers
from pipelines.tokenize import TokenizeOptions, TokenizeResult, tokenize_corpus
from pipelines.tokenize_command import tokenize
from vqmill.errors import UsageError
from vqmill.layout import group_metadata


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


def run(
    corpus: str, folder: Path, out: Path, environment: dict[str, str], *more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "tokenize", corpus, "--tokenizer", str(folder), "--out", str(out), "--shard-rows", "20", "--json", *more],
        capture_output=True, text=True, check=False, env=environment, timeout=250,
    )  # fmt: skip


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


def test_ray_address_is_joined_as_inside_a_ray_job(
    cluster: Started, reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.zarr"
    done = run(scenes, tokenizer_folder, out, cluster.environment | {"RAY_ADDRESS": cluster.address})
    assert done.returncode == 0, done.stderr
    assert "2 machines, 2 CPU, 0 GPU; 2 workers of 1 CPU" in done.stderr.splitlines()[0]
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


@pytest.mark.usefixtures("ray_session")
def test_machines_that_cannot_work_are_refused_before_they_do(tmp_path: Path) -> None:
    import ray

    from pipelines.remote import EncoderActor

    assert EncoderActor is not None
    (corpus := tmp_path / "photos.tar").touch()
    recorded: list[str] = []

    def welcome(machine: Machine, *, mixed: bool, there: Path = corpus) -> list[Any]:
        fleet = Fleet(lambda: None, Kinds("cpu A", recorded.append, mixed=mixed), there)
        answer = ray.put(machine)
        fleet.starting[answer] = "the actor"
        return fleet.welcome(answer)

    assert welcome(Machine("node-1", "cpu A", True), mixed=False) == ["the actor"]
    assert not recorded
    with pytest.raises(
        RunFailed, match=r"the machines differ \(cpu A; cpu B; the last one that came is node-2\).*--allow-mixed"
    ):
        welcome(Machine("node-2", "cpu B", True), mixed=False)
    assert not recorded
    assert welcome(Machine("node-2", "cpu 0", True), mixed=True) == ["the actor"]
    assert recorded == ["cpu 0; cpu A"]
    with pytest.raises(RunFailed, match=r"node-3: .*photos.tar is not there, .* same place on every machine"):
        welcome(Machine("node-3", "cpu A", False), mixed=False)
    assert welcome(Machine("node-3", "cpu A", False), mixed=False, there=tmp_path / "removed.tar") == ["the actor"]


@pytest.mark.usefixtures("ray_session")
def test_a_machine_without_our_code_is_told_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    (tmp_path / "only_here_4711.py").write_text("class Actor:\n    def describe(self, corpus):\n        return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # the workers of a Ray that runs do not see it
    import only_here_4711  # pyright: ignore[reportMissingImports]

    fleet = Fleet(ray.remote(only_here_4711.Actor).options(num_cpus=0).remote, Kinds("", print))
    fleet.start()
    with pytest.raises(RunFailed, match=r"(?s)did not start: .*Every machine of the cluster needs vqmill"):
        fleet.welcome(next(iter(fleet.starting)))


@pytest.mark.usefixtures("ray_session")
def test_an_actor_that_is_lost_while_it_starts_is_started_again_but_not_for_ever() -> None:
    import ray

    @ray.remote(max_restarts=0)
    class Dies:
        def describe(self, corpus: Path | None) -> None:
            os._exit(9)

    fleet = Fleet(Dies.options(num_cpus=0).remote, Kinds("", print))
    fleet.start()
    for _ in range(2):
        assert fleet.welcome(next(iter(fleet.starting))) == []
    with pytest.raises(RunFailed, match="an encoder worker did not start"):
        fleet.welcome(next(iter(fleet.starting)))


@pytest.mark.usefixtures("ray_session")
def test_a_stopped_job_goes_on_on_another_kind_of_machine_when_that_is_allowed(
    reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    options = TokenizeOptions(size=16, rows_per_shard=20)
    mixed = replace(options, cluster=ClusterFlags(allow_mixed=True))
    plan, out = plan_corpus(scenes), tmp_path / "codes.zarr"

    def make(options: TokenizeOptions) -> TokenizeResult:
        model = tokenizer.load(tokenizer_folder)
        return tokenize_corpus(plan, model, out, options, lambda done, total, note: None)

    shutil.copytree(reference, out)
    spec = vqmill.open_codes(out).spec
    other = {**spec.tokenizer, "computed_on": "another machine"}
    (out / "zarr.json").write_bytes(group_metadata(replace(spec, tokenizer=other, complete=False)))
    (out / "bottom/c/3/0/0").unlink()
    with pytest.raises(UsageError, match=r"(?s)tokenizer.computed_on: there .another machine.*--allow-mixed"):
        make(options)
    assert make(mixed).mended == (3,)
    kinds = f"another machine; {describe_device('cpu')}"
    assert vqmill.open_codes(out).spec.tokenizer["computed_on"] == kinds
    differing = [name for name, data in tree(out).items() if tree(reference)[name] != data]
    assert differing == ["zarr.json"]
    with pytest.raises(UsageError, match=r"(?s)there .*another machine.*--allow-mixed"):
        make(options)  # nor does it go back: what is recorded stays
    assert not make(mixed).did_something
