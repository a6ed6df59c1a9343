"""`python -m benchmarks.resident STORE POOL_BYTES COMPILED`: one shuffled epoch, and by how much it made this process grow, as JSON.

COMPILED is 1 or 0. The compiled code, which a process loads once, is counted apart from what the epoch takes.
Linux only: the peak is VmHWM of /proc/self/status.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vqmill
from benchmarks.peers import BATCH, touch
from vqmill import native


def status_bytes(name: str) -> int:
    """One line of /proc/self/status that is a size, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}.")


def growth(store: Path, pool_bytes: int, compiled: bool) -> dict[str, int]:
    """Bytes of the peak over an epoch above what was resident when the store was open and the epoch not begun; and those of the code."""
    codes = vqmill.open_codes(store)
    codes["codes"][0]
    before = status_bytes("VmRSS")
    if compiled:
        native.load()
    native.PROCESS = native.Native(worth_bytes=0 if compiled else 2**62)
    code = status_bytes("VmRSS") - before
    batches = codes.batches(BATCH, shuffle=True, pool_bytes=pool_bytes)
    before = status_bytes("VmRSS")
    rows = sum(touch(batch["codes"], codes["codes"].shape[1:]) for batch in batches)
    assert rows == len(codes)
    return {"growth_bytes": status_bytes("VmHWM") - before, "code_bytes": code}


if __name__ == "__main__":
    print(json.dumps(growth(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")))
