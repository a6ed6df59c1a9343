"""The command `doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.results import FAILED, Result

NEEDED = (
    "torch",
    "torchvision",
    "zarr",
    "numcodecs",
    "ray",
    "webdataset",
    "av",
    "pyarrow",
    "safetensors",
    "pillow",
    "cyclopts",
    "rich",
)
LOW_DISK_BYTES = 2_000_000_000


def doctor() -> Result:
    """Runs the command; see `vqmill doctor --help`."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    versions: dict[str, str | None] = {}
    missing = []
    for package in ("vqmill", *NEEDED):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
            missing.append(package)
    lines.append("packages: " + ", ".join(f"{name} {found or 'MISSING'}" for name, found in versions.items()))
    devices = [] if "torch" in missing else _devices()
    lines.append("devices: " + ", ".join(devices))
    reading = _reading()
    lines.append(f"reading codes: {reading}")
    free = shutil.disk_usage(Path.cwd()).free
    lines.append(
        f"disk: {free / 1e9:,.1f} GB free here"
        + ("; that is little, choose --out elsewhere" if free < LOW_DISK_BYTES else "")
    )
    code = 0
    if "ray" not in missing:
        try:
            lines.append(f"ray: {_try_ray()}")
        except Exception as error:  # whatever keeps Ray from starting is what we are here to say
            lines.append(f"ray: does not start: {error}")
            code = FAILED
    if missing:
        lines.append(f"missing: {', '.join(missing)}. Get them with: pip install {' '.join(missing)}")
        code = FAILED
    if not code:
        lines.append("all is well")
    return Result(
        lines, facts={"versions": versions, "devices": devices, "reading": reading, "free_bytes": free}, code=code
    )


def _devices() -> list[str]:
    import torch

    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return [f"cpu {torch.backends.cpu.get_cpu_capability()}", *gpus] + ([] if gpus else ["no GPU seen by torch"])


def _reading() -> str:
    from vqmill import native

    try:
        native.load()
    except native.UnavailableError as error:
        return f"in Python, at half the speed, because {error}"
    return f"by compiled code, once a process has decoded {native.WORTH_BYTES // 2**20} MiB"


def _try_ray() -> str:
    from pipelines.cluster import ray_cluster

    with ray_cluster(1):
        import ray

        resources = ray.cluster_resources()
        return f"starts, {resources.get('CPU', 0):.0f} CPU slots, {resources.get('GPU', 0):.0f} GPUs"
