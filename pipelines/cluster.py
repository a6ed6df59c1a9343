"""Starts a quiet Ray on this machine, or joins a cluster that is there.

Ray reads its security settings when it is first imported, so nothing in this project imports it at the top of a module that the
command line loads: `start_ray` sets the environment, then imports it.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vqmill.errors import UsageError

OBJECT_STORE_BYTES = 512 * 1024 * 1024  # only codes pass through it; Ray's own default takes a third of the memory
WORKER_ENVIRONMENT = {
    # glibc otherwise maps and unmaps every large tensor: up to 2.5 x slower convolutions on CPUs.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Share:
    """What one worker takes of a machine.

    Attributes:
        cpus: CPU slots.
        gpus: of a GPU, up to 1; None for all of one when the device is `cuda`, for none when it is not.
    """

    cpus: int = 1
    gpus: float | None = None

    def on(self, device: str) -> dict[str, float]:
        """What it is of Ray's resources, for `cpu` or `cuda`."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus or 1} if device.startswith("cuda") else {})


@dataclass(frozen=True)
class Crew:
    """What a Ray that runs gives to a job.

    Attributes:
        workers: how many.
        device: `cpu` or `cuda`, of each.
        resources: what each takes: CPU, GPU.
        joined: whether the cluster was there before; then it may have several machines, and may grow.
        summary: which Ray it is, and what it has.
    """

    workers: int
    device: str
    resources: dict[str, float]
    joined: bool
    summary: str


def address_to_join(asked: str | None) -> str | None:
    """The Ray cluster that a job joins; None when it starts one of its own.

    Args:
        asked: `--address`; None leaves it to RAY_ADDRESS, which `ray job submit` sets for what it runs. `local` starts one in any case.

    Raises:
        UsageError: an address that no driver can use.
    """
    address = asked or os.environ.get(ADDRESS)
    if not address or address == "local":
        return None
    name = f"--address {address}" if asked else f"{ADDRESS}={address}"
    if address.startswith("ray://"):
        raise UsageError(
            f"{name}: an address of Ray Client, which ends what it runs when its connection breaks, and is not made for long jobs. Run this on "
            "a machine of the cluster with --address HOST:PORT, or hand it in: ray job submit -- vqmill tokenize ..."
        )
    host, colon, port = address.rpartition(":")
    if address != "auto" and not (host and colon and port.isdecimal() and "/" not in address):
        raise UsageError(
            f"{name}: expected auto or HOST:PORT, the address that `ray start --head` prints (port 6379, if nothing else was chosen), or local."
        )
    return address


@contextmanager
def ray_cluster(workers: int, device: str = "cpu") -> Iterator[None]:
    """A running Ray of our own with room for so many workers, one device each; see `ray_crew`."""
    with ray_crew(workers, device):
        yield


@contextmanager
def ray_crew(workers: int | None, device: str, share: Share = Share(), address: str | None = None) -> Iterator[Crew]:
    """A running Ray with room for workers; left at the end, unless this process had one already.

    Args:
        workers: how many; None for as many as a cluster that is joined has room for.
        device: `cpu` or `cuda`; `auto` takes the GPUs of a cluster that is joined, if it has any.
        share: what each worker takes.
        address: from `address_to_join`.

    Raises:
        UsageError: a Ray that does not grow has too little room, or the cluster cannot be joined.
    """
    ours = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    stop = signal.getsignal(signal.SIGTERM)
    if ours and address:
        join_ray(address)
    elif ours:
        start_ray((workers or 1) * share.cpus)
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)  # Ray's own would end the process with no word
    import ray

    try:
        yield _crew(workers, device, share, address)
    finally:
        if ours:
            ray.shutdown()


def _crew(workers: int | None, device: str, share: Share, address: str | None) -> Crew:
    import ray

    total = ray.cluster_resources()
    if device == "auto":
        device = "cuda" if total.get("GPU") or share.gpus else "cpu"
    wanted = share.on(device)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(min(int(has.get(kind, 0) / number + 1e-6) for kind, number in wanted.items()) for has in machines)
    each = ", ".join(f"{number:g} {kind}" for kind, number in wanted.items())
    if address is None:
        if slots < (workers or 1):
            raise UsageError(
                f"--workers {workers}: there is room for {slots}, with {each} for each. Ask for fewer workers."
            )
        return Crew(workers or slots, device, wanted, False, f"a Ray of its own on this machine, {workers} workers")
    workers = workers or max(1, slots)
    summary = (
        f"the Ray cluster {ray.get_runtime_context().gcs_address}: {len(machines)} machines, {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU; "
        f"{workers} workers of {each}"
    )
    if slots < workers:
        summary += f"; there is room for {slots} now, the others wait until the cluster has more"
    return Crew(workers, device, wanted, True, summary)


def join_ray(address: str) -> None:
    """Joins a cluster that is there, as this machine's part of it. RAY_AUTH_MODE and RAY_AUTH_TOKEN are those of its owner.

    Raises:
        UsageError: there is none, or it does not let us in.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        if address != "auto":  # of a wrong address, Ray would say so after minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (
        Exception
    ) as error:  # of many kinds: no route, no token, another version, no part of the cluster on this machine
        raise UsageError(
            f"the Ray cluster {address} cannot be joined: {' '.join(str(error).split())} It is joined from a machine that `ray start` made a part "
            "of it, with the same RAY_AUTH_MODE and token as it was started with."
        ) from error


def start_ray(slots: int) -> None:
    """Starts a local Ray with so many CPU slots, one for each core at least: no dashboard, and nobody enters without its token.

    The token is made for this one run and lives in the environment of its processes only. Set RAY_AUTH_MODE to decide otherwise.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        assert "ray" not in sys.modules, "ray was imported before its security settings were made"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # what Ray will do by default; silences its warning
    import ray

    ray.init(
        address="local",
        num_cpus=max(slots, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
