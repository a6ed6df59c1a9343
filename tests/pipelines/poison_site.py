"""Put as sitecustomize.py where processes find it, this makes their decoder fail on marked files, as bugs of decoders do; see test_careful.py."""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

from PIL import Image

open_image = Image.open


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def eat() -> None:
    """Takes memory without end; without a limit, dies of it before the machine suffers, as by the kernel's hand."""
    import numpy as np

    limited = resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    held = []
    while True:
        held.append(np.empty(1 << 26, np.uint8))
        if len(held) == 4 and not limited:
            kill()


DEEDS = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(0),
    "kill": kill,
    "memory": eat,
    "sleep": lambda: time.sleep(10**6),
    "hold": lambda: ctypes.PyDLL(None).sleep(10**6),  # and never gives the interpreter back
}


def open_poisoned(file, *args, **options):
    mark = file.getvalue().partition(b"POISON:")[2].decode() if hasattr(file, "getvalue") else ""
    if mark.startswith("first "):  # so many times, counted in a file
        _, times, path = mark.split(" ")
        with Path(path).open("a") as counter:
            counter.write("x")
        if Path(path).stat().st_size <= int(times):
            kill()
    elif mark:
        DEEDS[mark]()
    return open_image(file, *args, **options)


Image.open = open_poisoned
