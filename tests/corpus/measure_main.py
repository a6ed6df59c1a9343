"""Decodes the files it is given, and prints for each what became of it, in how many seconds, and the memory it took beside the file."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

from PIL import Image

from pipelines.corpus import BadImage, Preprocessing, decode_image


def status(name: str) -> float:
    """A value of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


def main() -> None:
    small = io.BytesIO()
    Image.new("RGB", (64, 48)).save(small, "PNG")
    decode_image(small.getvalue(), Preprocessing(32))  # what is loaded once is not the file's
    for name in sys.argv[1:]:
        data = Path(name).read_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = status("VmRSS"), time.perf_counter()
        try:
            outcome = decode_image(data, Preprocessing(64)).kind
        except BadImage as bad:
            outcome = str(bad.reason)
        seconds = time.perf_counter() - start
        print(json.dumps([Path(name).name, outcome, seconds, status("VmHWM") - before]), flush=True)


if __name__ == "__main__":
    main()
