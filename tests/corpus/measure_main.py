"""Decodes the images and tars it is given, and prints for each what became of it, in how many seconds, and the memory it took.

The bytes of an image are there before; tars are read as corpora.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from pipelines.corpus import BadImage, CorpusError, Preprocessing, decode_image, plan_corpus, read_samples
from pipelines.corpus.decoding import decode_sample


def status(name: str) -> float:
    """A value of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


def image(data: bytes) -> str:
    """The kind of an image, or why it is none."""
    try:
        return decode_image(data, Preprocessing(64)).kind
    except BadImage as bad:
        return str(bad.reason)


def tar(path: str) -> str:
    """How many samples of a tar decode, and why the others do not: `2 good, 1 truncated`."""
    found: Counter[str] = Counter()
    try:
        for shard in plan_corpus(path, gzip_tars=True).shards:
            for sample in read_samples(shard):
                try:
                    decode_sample(sample, Preprocessing(64))
                    found["good"] += 1
                except BadImage as bad:
                    found[str(bad.reason)] += 1
    except CorpusError:
        return "no corpus"
    return ", ".join(f"{count} {what}" for what, count in sorted(found.items()))


def main() -> None:
    small = io.BytesIO()
    Image.new("RGB", (64, 48)).save(small, "PNG")
    decode_image(small.getvalue(), Preprocessing(32))  # what is loaded once is not the file's
    for name in sys.argv[1:]:
        is_tar = ".tar" in Path(name).name
        data = b"" if is_tar else Path(name).read_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = status("VmRSS"), time.perf_counter()
        outcome = tar(name) if is_tar else image(data)
        seconds = time.perf_counter() - start
        print(json.dumps([Path(name).name, outcome, seconds, status("VmHWM") - before]), flush=True)


if __name__ == "__main__":
    main()
