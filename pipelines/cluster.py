"""Starts a quiet Ray on this machine.

Ray reads its security settings when it is first imported, so nothing in this project imports it at the top of a module that the
command line loads: `start_ray` sets the environment, then imports it.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vqmill.errors import UsageError

OBJECT_STORE_BYTES = 512 * 1024 * 1024  # only codes pass through it; Ray's own default takes a third of the memory
WORKER_ENVIRONMENT = {
    # glibc otherwise maps and unmaps every large tensor: up to 2.5 x slower convolutions on CPUs.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


@contextmanager
def ray_cluster(workers: int, device: str = "cpu") -> Iterator[None]:
    """A running Ray with room for so many workers, one device each; stopped at the end, unless this process had one already.

    Args:
        workers: how many.
        device: `cpu` or `cuda`.

    Raises:
        UsageError: there are fewer CPU slots or GPUs than workers.
    """
    ours = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    if ours:
        start_ray(workers)
    import ray

    try:
        kind = "GPU" if device.startswith("cuda") else "CPU"
        slots = int(ray.cluster_resources().get(kind, 0))
        if slots < workers:
            raise UsageError(f"--workers {workers}: there is room for {slots}, one {kind} each. Ask for fewer workers.")
        yield
    finally:
        if ours:
            ray.shutdown()


def start_ray(workers: int) -> None:
    """Starts a local Ray with one CPU slot a worker at least: no dashboard, and nobody enters without its token.

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
        num_cpus=max(workers, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
        _node_ip_address="127.0.0.1",
    )
