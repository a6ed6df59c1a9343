"""Opening and indexing: errors that say what to do, and numpy's answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import vqmill
from vqmill import CodesError


def test_a_missing_path_says_how_to_make_a_store(tmp_path):
    with pytest.raises(CodesError, match=r"nowhere\.zarr: no such code store.*vqmill tokenize"):
        vqmill.open_codes(tmp_path / "nowhere.zarr")


def test_what_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(CodesError, match="not a code store"):
        vqmill.open_codes(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CodesError, match="not a code store"):
        vqmill.open_codes(tmp_path / "file")


@pytest.mark.parametrize("url", ["s3://bucket/codes.zarr", "https://example.org/codes.zarr", "file:///codes.zarr"])
def test_urls_are_refused_by_name(url):
    with pytest.raises(CodesError, match="only local stores"):
        vqmill.open_codes(url)


@pytest.mark.parametrize(
    "content",
    [
        '{"zarr_format": 3, "node_type": "group", "attributes": {}}',
        '{"zarr_format": 3, "node_type": "group", "attributes": {"vqmill": 1}}',
        '{"zarr_format": 3, "node_type": "group", "attributes": null}',
        '{"zarr_format": 3, "node_type": "group"}',
        "[]",
        "null",
    ],
)
def test_a_foreign_group_is_refused(tmp_path, content):
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(CodesError, match="not a vqmill code store"):
        vqmill.open_codes(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfd", b'{"a": ', b"[" * 200_000, b'{"a":' * 100_000])
def test_damaged_and_deep_json_is_refused(store, content):
    (store / "zarr.json").write_bytes(content)
    with pytest.raises(CodesError, match=r"zarr\.json: not JSON"):
        vqmill.open_codes(store)


def test_oversized_metadata_is_refused(store, monkeypatch):
    monkeypatch.setattr("vqmill.layout.MAX_METADATA_BYTES", 100)
    with pytest.raises(CodesError, match="bytes of metadata"):
        vqmill.open_codes(store)


def test_a_newer_format_is_refused(store, stores):
    stores.edit_json(store / "zarr.json", lambda group: group["attributes"]["vqmill"].update(format_version=2))
    with pytest.raises(CodesError, match=r"format_version is 2.*newer vqmill"):
        vqmill.open_codes(store)


def test_an_unfinished_store_is_opened_only_on_request(tmp_path, stores):
    spec, codes = stores.two_levels, stores.codes(stores.two_levels, 21)
    path = stores.write(tmp_path / "codes.zarr", spec, codes, stop_after=2)
    with pytest.raises(CodesError, match=r"unfinished: 16 rows.*allow_incomplete"):
        vqmill.open_codes(path)
    read = vqmill.open_codes(path, allow_incomplete=True)
    np.testing.assert_array_equal(read["bottom"][:], codes["bottom"][:16])
    assert len(vqmill.open_codes(stores.write(path, spec, codes), allow_incomplete=True)) == 21


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"5", b"{}", b"[" * 200_000, b"\xff", b'{"zarr_format": 3}']
)
@pytest.mark.parametrize("name", ["top", "label"])
def test_damaged_array_metadata_is_refused(store, name, content):
    (store / name / "zarr.json").write_bytes(content)
    with pytest.raises(CodesError, match=f"'{name}'"):
        vqmill.open_codes(store)


def test_missing_array_metadata_is_refused(store):
    (store / "bottom/zarr.json").unlink()
    with pytest.raises(CodesError, match="'bottom'"):
        vqmill.open_codes(store)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["data_type"], "uint8"),
        (["data_type"], "string"),
        (["data_type"], "nonsense"),
        (["shape"], [20, 2, 3]),
        (["shape"], [21, 3, 3]),
        (["shape"], [-21, 2, 3]),
        (["fill_value"], "x"),
        (["fill_value"], 0),
        (["codecs"], []),
        (["codecs"], "bytes"),
        (["codecs"], [5]),
        (["storage_transformers"], [{"name": "x"}]),
        (["codecs", 0, "configuration", "codecs", 1, "name"], "nonsense"),
        (["codecs", 0, "configuration", "codecs", 1, "name"], "numcodecs.zlib"),
        (["chunk_grid", "configuration", "chunk_shape"], [7, 2, 3]),
        (["node_type"], "group"),
    ],
)
def test_an_array_that_is_not_what_the_store_says_is_refused(store, stores, path, value):
    def change(metadata):
        for step in path[:-1]:
            metadata = metadata[step]
        metadata[path[-1]] = value

    stores.edit_json(store / "top/zarr.json", change)
    with pytest.raises(CodesError, match="'top'"):
        vqmill.open_codes(store)


def test_rows_per_shard_must_be_the_arrays(store, stores):
    stores.edit_json(store / "zarr.json", lambda group: group["attributes"]["vqmill"].update(rows_per_shard=7))
    with pytest.raises(CodesError):
        vqmill.open_codes(store)


def test_an_array_of_zarr_version_2_is_refused(store):
    """Its codecs go further than ours, down to pickle."""
    (store / "top/zarr.json").unlink()
    array = {"zarr_format": 2, "shape": [21, 2, 3], "chunks": [8, 2, 3], "dtype": "<u2", "compressor": None}
    array |= {"fill_value": 0, "order": "C", "filters": None, "dimension_separator": "."}
    (store / "top/.zarray").write_text(json.dumps(array))
    with pytest.raises(CodesError, match="'top'"):
        vqmill.open_codes(store)


def test_what_an_open_store_says(store, stores):
    codes = vqmill.open_codes(str(store))
    assert codes.path == store
    assert len(codes) == 21
    assert codes.levels == ("top", "bottom")
    assert codes.class_names == ("cat", "dog")
    assert codes.spec == replace(stores.two_levels, num_rows=21, num_commits=3, complete=True)
    assert codes["top"].shape == (21, 2, 3)
    assert codes["top"].dtype == np.uint16
    assert codes["bottom"].dtype == np.uint8
    assert len(codes["bottom"]) == 21
    assert "21 rows" in repr(codes)
    assert codes.labels.tolist() == [-1 if row % 5 == 4 else row for row in range(21)]
    with pytest.raises(CodesError, match="no level 'middle'"):
        codes["middle"]


MASK = np.arange(21) % 4 == 1


@pytest.mark.parametrize(
    "key",
    [
        0,
        20,
        -1,
        -21,
        np.int64(3),
        np.uint8(3),
        slice(None),
        slice(3, 17),
        slice(-5, None),
        slice(None, -18),
        slice(0, 21, 4),
        slice(5, 5),
        slice(9, 3),
        slice(0, 10**6),
        [3],
        [3, 1, 17, 8],
        [3, 3, -1, 3],
        [],
        np.array([], np.int64),
        np.array([20, 0]),
        np.array([1, 2], np.uint64),
        MASK,
        MASK.tolist(),
        np.zeros(21, bool),
        (3, 1),
        (3, 1, 2),
        (3, -1, -2),
        (slice(2, 11), 1),
        (slice(2, 11), slice(None), slice(1, 3)),
        (slice(2, 11), slice(None), -1),
        ([4, 2], 1, slice(0, 2)),
        (MASK, slice(None), 0),
        (slice(0, 3), ...),
        ...,
        (..., 0),
        (..., 3, 1, 2),
        slice(None, None, -1),
        slice(20, 2, -3),
        ([20, 0, 0, 5], [1, 0]),
    ],
    ids=repr,
)
def test_indexing_is_numpys(store, stores, key):
    rows, *rest = key if isinstance(key, tuple) else (key,)
    expected = stores.codes(stores.two_levels, 21)["top"].astype(np.uint16)
    expected = expected[key] if rows is ... or isinstance(rows, int) else expected[rows][(slice(None), *rest)]
    read = vqmill.open_codes(store)["top"][key]
    assert isinstance(read, np.ndarray)
    assert read.dtype == np.uint16
    assert read.shape == expected.shape
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize(
    "key",
    [
        21,
        -22,
        [0, 21],
        [0, -22],
        np.ones(20, bool),
        (0, 2),
        (0, 0, 0, 0),
        [0.5],
        [[0, 1], [2, 3]],
        "top",
        1.0,
        None,
        True,
    ],
    ids=repr,
)
def test_what_cannot_be_indexed_is_an_index_error(store, key):
    with pytest.raises(IndexError):
        vqmill.open_codes(store)["top"][key]


def test_numpy_takes_a_level_whole(store, stores):
    expected = stores.codes(stores.two_levels, 21)["bottom"]
    bottom = vqmill.open_codes(store)["bottom"]
    np.testing.assert_array_equal(np.asarray(bottom), expected)
    assert np.asarray(bottom, dtype=np.int32).dtype == np.int32
    np.testing.assert_array_equal(np.array(bottom, copy=True), expected)
    with pytest.raises(ValueError, match="copy=False"):
        np.array(bottom, copy=False)
    assert sum(1 for _ in bottom) == 21


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, None), (0, 8), (7, 9), (8, 16), (3, 21), (20, 21), (15, 17), (0, 0), (9, 3), (-2, None), (0, -1), (5, 99)],
)
def test_samples_over_part_borders(store, start, stop):
    table = vqmill.open_codes(store).samples(start, stop)
    rows = range(21)[start:stop]
    assert table["key"].to_pylist() == [f"class/sample-{row}" for row in rows]
    assert table["index"].to_pylist() == list(rows)
    assert table["label"].to_pylist() == [None if row % 5 == 4 else row for row in rows]
    assert table.schema.names == [
        "key",
        "source",
        "input_shard",
        "index",
        "label",
        "caption",
        "json",
        "width",
        "height",
    ]


def test_samples_read_no_more_parts_than_needed(store):
    for shard in (0, 2):
        (store / f"samples/part-{shard:06d}.parquet").unlink()
    codes = vqmill.open_codes(store)
    assert codes.samples(8, 16).num_rows == 8
    with pytest.raises(CodesError, match=r"part-000002\.parquet.*vqmill verify"):
        codes.samples(8, 17)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100])
def test_a_damaged_part_is_named(store, content):
    (store / "samples/part-000001.parquet").write_bytes(content)
    with pytest.raises(CodesError, match=r"part-000001\.parquet"):
        vqmill.open_codes(store).samples()


def test_a_part_with_another_number_of_rows_is_not_passed_on(store):
    """Rows would shift against their codes."""
    shutil.copyfile(store / "samples/part-000002.parquet", store / "samples/part-000001.parquet")
    with pytest.raises(CodesError, match=r"part-000001\.parquet"):
        vqmill.open_codes(store).samples()


def test_quarantine_is_read_over_all_parts(store):
    table = vqmill.open_codes(store).quarantine()
    assert table["key"].to_pylist() == ["bad-0", "bad-1", "bad-2"]
    assert table.schema.names == ["key", "source", "input_shard", "index", "reason", "detail"]


@pytest.mark.parametrize("parent", ["_hidden", ".hidden", "with space %20", "k=v"])
def test_any_folder_name_will_do(tmp_path, stores, parent):
    path = stores.write(tmp_path / parent / "codes.zarr", stores.two_levels, stores.codes(stores.two_levels, 9))
    codes = vqmill.open_codes(path)
    assert codes.samples().num_rows == len(codes["top"][:]) == 9
    assert codes.samples().schema.names[-1] == "height"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
@pytest.mark.parametrize("array", ["top", "label"])
def test_a_damaged_zarr_shard_is_never_read_as_codes(store, array, damage):
    """Neither by index nor in batches: no fill value, no missing label in place of what was lost."""
    file = store / ("top/c/1/0/0" if array == "top" else "label/c/1")
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b""}[damage])
    codes = vqmill.open_codes(store)
    assert len(codes["top"][0:8]) == 8
    with pytest.raises(CodesError, match=rf"codes\.zarr.*{array}"):
        codes.labels if array == "label" else codes["top"][7:9]
    with pytest.raises(CodesError, match=array):
        list(codes.batches(4))
