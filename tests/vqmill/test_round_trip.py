"""What goes in comes out, through our reader, zarr-python and TensorStore alike, and always as the same bytes."""

from __future__ import annotations

import json
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from hypothesis import given, settings

import vqmill
from vqmill import LevelSpec, StoreSpec
from vqmill import spec as spec_module
from vqmill.layout import encode_label_shard, encode_zarr_shard, parquet_bytes
from vqmill.spec import CODECS
from vqmill.verify import verify_store
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard

CODEBOOK_SIZES = st.one_of(
    st.sampled_from([1, 2, 254, 255, 256, 257, 65_534, 65_535, 65_536, 65_537, 2**32 - 1]), st.integers(1, 70_000)
)
GRIDS = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def specs(draw):
    names = draw(st.sampled_from([["codes"], ["top", "bottom"], ["top", "middle", "bottom"]]))
    levels = tuple(LevelSpec(name, draw(CODEBOOK_SIZES), draw(GRIDS)) for name in names)
    return StoreSpec(levels, draw(st.integers(1, 13)), {"fingerprint": "f"}, codec=draw(st.sampled_from(CODECS)))


def read_with_zarr(store, name):
    return zarr.open_array(store / name, mode="r", zarr_format=3)[:]


def read_with_tensorstore(store, name):
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
    return tensorstore.open(driver, read=True).result().read().result()


@settings(deadline=None, max_examples=20)
@given(spec=specs(), full_shards=st.integers(0, 2), tail=st.integers(0, 12), chunk_bytes=st.integers(1, 400))
def test_any_store_reads_back_in_every_reader(tmp_path_factory, stores, spec, full_shards, tail, chunk_bytes):
    num_rows = max(1, full_shards * spec.rows_per_shard + tail % spec.rows_per_shard)
    codes = stores.codes(spec, num_rows, seed=num_rows)
    labels = [None if row % 3 == 2 else row * 10**9 for row in range(num_rows)]
    path = tmp_path_factory.mktemp("any") / "codes.zarr"
    with mock.patch.object(spec_module, "CHUNK_BYTES", chunk_bytes):  # several chunks in a Zarr shard
        stores.write(path, spec, codes, labels)
        assert verify_store(path).problems == ()
    ours = vqmill.open_codes(path)
    assert len(ours) == num_rows
    assert ours.levels == tuple(level.name for level in spec.levels)
    for level in spec.levels:
        assert ours[level.name].shape == codes[level.name].shape
        assert ours[level.name].dtype == level.dtype
        for read in (ours[level.name][:], read_with_zarr(path, level.name), read_with_tensorstore(path, level.name)):
            assert read.dtype == level.dtype
            np.testing.assert_array_equal(read, codes[level.name])
    expected_labels = [-1 if label is None else label for label in labels]
    for read in (ours.labels, read_with_zarr(path, "label"), read_with_tensorstore(path, "label")):
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, expected_labels)
    samples = ours.samples()
    assert samples["key"].to_pylist() == [f"class/sample-{row}" for row in range(num_rows)]
    assert samples["label"].to_pylist() == labels


def test_foreign_readers_see_names_and_fill(store):
    group = zarr.open_group(store, mode="r", zarr_format=3)
    assert group.attrs["vqmill"]["num_rows"] == 21
    assert group["top"].metadata.dimension_names == ("row", "y", "x")
    opened = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "bottom")}}, read=True
    ).result()
    assert opened.domain.labels == ("row", "y", "x")
    assert opened.fill_value == 255


def test_video_axes_are_named(tmp_path, stores):
    spec = StoreSpec((LevelSpec("codes", 16, (2, 3, 4)),), 4, {})
    path = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 5))
    assert json.loads((path / "codes/zarr.json").read_bytes())["dimension_names"] == ["row", "time", "y", "x"]


@pytest.mark.parametrize("codebook_size", [1, 255, 256, 65_535, 65_536])
@pytest.mark.parametrize("code", ["first", "last"])
def test_constant_codes_leave_bytes_behind(tmp_path, stores, codebook_size, code):
    spec = StoreSpec((LevelSpec("codes", codebook_size, (3, 3)),), 4, {})
    codes = {"codes": np.full((6, 3, 3), 0 if code == "first" else codebook_size - 1)}
    path = stores.write(tmp_path / "codes.zarr", spec, codes)
    assert (path / "codes/c/0/0/0").stat().st_size > 0
    assert (path / "codes/c/1/0/0").stat().st_size > 0
    for read in (vqmill.open_codes(path)["codes"][:], read_with_zarr(path, "codes")):
        np.testing.assert_array_equal(read, codes["codes"])
    np.testing.assert_array_equal(read_with_tensorstore(path, "codes"), codes["codes"])


@settings(deadline=None, max_examples=12)
@given(spec=specs(), rows=st.integers(1, 13), seed=st.integers(0, 5))
def test_the_same_rows_give_the_same_bytes(stores, spec, rows, seed):
    rows = min(rows, spec.rows_per_shard)
    for level in spec.levels:
        codes = stores.codes(spec, rows, seed)[level.name]
        expected = encode_zarr_shard(spec, level, codes)
        for other in (codes.astype(level.dtype), np.asfortranarray(codes), np.repeat(codes, 2, axis=0)[::2]):
            assert encode_zarr_shard(spec, level, other) == expected
        if level.codebook_size > 1:
            changed = codes.copy()
            changed.reshape(-1)[-1] = (changed.reshape(-1)[-1] + 1) % level.codebook_size
            assert encode_zarr_shard(spec, level, changed) != expected


def test_tables_give_the_same_bytes_however_they_were_put_together(stores):
    whole = stores.samples(list(range(300)))
    pieces = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 250), whole.slice(253)])
    longer = stores.samples(list(range(400))).slice(0, 300)
    assert parquet_bytes(whole) == parquet_bytes(pieces) == parquet_bytes(longer)


def test_the_order_in_which_shards_are_written_does_not_matter(tmp_path, stores):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    forward = stores.write(tmp_path / "forward.zarr", spec, codes)
    with StoreWriter(tmp_path / "backward.zarr", spec) as writer:
        files = {}
        for shard in (2, 0, 1):
            part = slice(shard * 8, shard * 8 + 8)
            rows = {name: values[part] for name, values in codes.items()}
            samples = stores.samples([None] * len(rows["top"]), shard * 8)
            files[shard] = write_shard(writer.store, writer.spec, shard, rows, samples, stores.quarantine(shard))
        for shard, rows in enumerate((8, 8, 5)):
            writer.commit(rows, Cursor(shard + 1), Counts(rows, 1), files[shard])
        writer.finish()
    assert stores.files(tmp_path / "backward.zarr") == stores.files(forward)


def test_a_store_without_a_row_opens(tmp_path, stores):
    spec = stores.two_levels
    with StoreWriter(tmp_path / "codes.zarr", spec) as writer:
        empty = {name: values[:0] for name, values in stores.codes(spec, 1).items()}
        files = write_shard(writer.store, writer.spec, 0, empty, stores.samples([]), stores.quarantine(0))
        assert sorted(files) == ["quarantine/part-000000.parquet", "samples/part-000000.parquet"]
        writer.commit(0, Cursor(1), Counts(quarantined=1), files)
        writer.finish()
    codes = vqmill.open_codes(tmp_path / "codes.zarr")
    assert len(codes) == len(codes["top"]) == codes.samples().num_rows == len(codes.labels) == 0
    assert codes.quarantine().num_rows == 1
    assert list(codes.batches(4, shuffle=True, last="pad")) == []
    assert read_with_tensorstore(tmp_path / "codes.zarr", "top").shape == (0, 2, 3)
    assert verify_store(tmp_path / "codes.zarr").problems == ()


def test_a_last_commit_of_quarantine_rows_only(tmp_path, stores):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 8)
    path = stores.write(tmp_path / "codes.zarr", spec, codes, finish=False)
    with StoreWriter(path, spec) as writer:
        empty = {name: values[:0] for name, values in codes.items()}
        files = write_shard(path, writer.spec, 1, empty, stores.samples([]), stores.quarantine(1))
        writer.commit(0, Cursor(2), Counts(quarantined=1), files)
        writer.finish()
    read = vqmill.open_codes(path)
    assert (len(read), read.quarantine().num_rows, read.samples().num_rows) == (8, 2, 8)
    assert verify_store(path).problems == ()


@pytest.mark.parametrize("bad", [-1, 512, 65_535, 70_000])
def test_codes_out_of_range_are_never_written(stores, bad):
    spec = stores.two_levels
    codes = stores.codes(spec, 3)["top"]
    codes[1, 1, 1] = bad
    with pytest.raises(vqmill.CodesError, match=rf"'top'.*{bad}.*0\.\.511"):
        encode_zarr_shard(spec, spec.levels[0], codes)


@pytest.mark.parametrize("shape", [(0, 2, 3), (9, 2, 3), (3, 3, 2), (3, 6), (3, 2, 3, 1)])
def test_rows_of_another_shape_are_never_written(stores, shape):
    with pytest.raises(vqmill.CodesError, match="top"):
        encode_zarr_shard(stores.two_levels, stores.two_levels.levels[0], np.zeros(shape, np.int64))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool])
def test_what_is_not_an_integer_is_never_written(stores, dtype):
    with pytest.raises(vqmill.CodesError, match="top"):
        encode_zarr_shard(stores.two_levels, stores.two_levels.levels[0], np.ones((3, 2, 3), dtype))


def test_labels_keep_64_bits(stores):
    labels = np.array([-1, 0, 2**62], np.int64)
    assert encode_label_shard(stores.two_levels, labels) != encode_label_shard(stores.two_levels, labels + 1)


def test_parquet_parts_are_plain(store):
    table = pq.ParquetFile(store / "samples/part-000002.parquet")
    assert table.metadata.num_rows == 5
    assert table.schema_arrow.names[:4] == ["key", "source", "input_shard", "index"]
