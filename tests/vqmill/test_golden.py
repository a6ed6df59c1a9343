"""Stores that were written once and are never written again: every reader still gives what arithmetic says they hold."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr

import vqmill
from vqmill.layout import read_spec
from vqmill.spec import FORMAT_VERSION
from vqmill.verify import verify_store

PLACE = Path(__file__).parent / "golden"


def golden_contents():
    """The module beside the golden stores that says what they hold."""
    spec = importlib.util.spec_from_file_location("golden_contents", PLACE / "contents.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


CONTENTS = golden_contents()
STORES = {
    f"{folder.name}-{name}": (folder / f"{name}.zarr", name) for folder in PLACE.glob("v*") for name in CONTENTS.GOLDEN
}


@pytest.fixture(params=sorted(STORES))
def golden(request):
    """Folder, and what it holds."""
    path, name = STORES[request.param]
    return path, CONTENTS.GOLDEN[name]


def zarr_python(path):
    return zarr.open_array(path, mode="r", zarr_format=3)[:]


def zarrs_python(path):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(path, mode="r", zarr_format=3)
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return array[:]


def tensor_store(path):
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(driver, read=True).result().read().result()


def expected_labels(golden):
    labels = [CONTENTS.sample(row)["label"] for row in range(golden.num_rows)]
    return np.array([-1 if label is None else label for label in labels], np.int64)


def test_there_is_a_golden_store_of_every_kind_and_version():
    assert len(STORES) == 3 * FORMAT_VERSION
    assert all(path.is_dir() for path, _ in STORES.values())


def test_our_reader_gives_what_was_written(golden):
    path, content = golden
    codes = vqmill.open_codes(path)
    assert len(codes) == content.num_rows
    for level in content.spec.levels:
        read = codes[level.name][:]
        assert (read.dtype, read.shape) == (level.dtype, (content.num_rows, *level.grid))
        np.testing.assert_array_equal(read, CONTENTS.codes(level, content.num_rows))
    np.testing.assert_array_equal(codes.labels, expected_labels(content))
    assert codes.samples().to_pylist() == [CONTENTS.sample(row) for row in range(content.num_rows)]
    assert codes.quarantine().to_pylist() == [CONTENTS.bad_sample(number) for number in range(content.input_shards)]
    assert codes.class_names == ("cat", "dög")


def test_nothing_is_wrong_with_it(golden):
    path, content = golden
    found = verify_store(path)
    assert found.problems == ()
    assert found.counts.seen == content.spec.corpus["num_samples"]


@pytest.mark.parametrize("read", [zarr_python, tensor_store, zarrs_python])
def test_other_readers_give_the_same(golden, read):
    path, content = golden
    codes = vqmill.open_codes(path)
    for level in content.spec.levels:
        found = np.asarray(read(path / level.name))
        assert found.dtype == level.dtype
        np.testing.assert_array_equal(found, codes[level.name][:])
    np.testing.assert_array_equal(read(path / "label"), codes.labels)


def test_tables_are_plain_parquet_and_the_rest_plain_json(golden):
    path, content = golden
    samples = [row for part in sorted((path / "samples").iterdir()) for row in pq.ParquetFile(part).read().to_pylist()]
    assert samples == [CONTENTS.sample(row) for row in range(content.num_rows)]
    bad = [row for part in sorted((path / "quarantine").iterdir()) for row in pq.ParquetFile(part).read().to_pylist()]
    assert bad == [CONTENTS.bad_sample(number) for number in range(content.input_shards)]
    head = json.loads((path / "zarr.json").read_bytes())["attributes"]["vqmill"]
    records = [json.loads(file.read_bytes()) for file in sorted((path / "commits").iterdir())]
    assert (head["num_rows"], head["num_commits"]) == (content.num_rows, len(records))
    assert sum(record["rows"] for record in records) == content.num_rows
    assert records[-1]["cursor"] == {"input_shard": content.input_shards, "span": 0, "row": 0}


def test_its_metadata_is_what_was_asked_for(golden):
    path, content = golden
    spec = read_spec(path)
    assert spec == content.spec.with_progress(num_rows=spec.num_rows, num_commits=spec.num_commits, complete=True)
