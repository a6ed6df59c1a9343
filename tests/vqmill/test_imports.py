"""Reading codes needs numpy and zarr: nothing heavy is loaded behind the reader's back."""

from __future__ import annotations

import subprocess
import sys

HEAVY = "torch, ray, av, torchvision, webdataset, PIL, safetensors, numba"

READ = """
import sys
import vqmill
codes = vqmill.open_codes(sys.argv[1])
assert sum(len(batch["label"]) for batch in codes.batches(4, shuffle=True)) == len(codes) == 21
assert codes["top"][0:8].shape == (8, 2, 3)
print(",".join(sorted(sys.modules)))
"""


def modules_after(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return {module.split(".")[0] for module in done.stdout.strip().split(",")} | set(done.stdout.strip().split(","))


def test_importing_vqmill_is_light():
    loaded = modules_after("import sys, vqmill; print(','.join(sorted(sys.modules)))")
    assert "vqmill" in loaded
    assert loaded.isdisjoint({*HEAVY.split(", "), "pyarrow", "pandas", "matplotlib"})


def test_reading_batches_is_light(store):
    assert modules_after(READ, str(store)).isdisjoint({*HEAVY.split(", "), "pyarrow"})


def test_reading_samples_loads_only_pyarrow(store):
    loaded = modules_after(READ.replace("print", "codes.samples(0, 9); codes.quarantine(); print"), str(store))
    assert "pyarrow.parquet" in loaded
    assert loaded.isdisjoint(HEAVY.split(", "))
