"""The specification: dtype, fill and chunk rules, and what the group's attributes may hold."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from vqmill import CodesError, LevelSpec, StoreSpec
from vqmill.layout import group_metadata, read_spec
from vqmill.spec import (
    CHUNK_BYTES,
    MAX_ROWS_PER_SHARD,
    SHARD_BYTES,
    Segment,
    default_rows_per_shard,
    dtype_for,
    usable_rows_per_shard,
)


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [
        (1, "uint8"),
        (255, "uint8"),
        (256, "uint16"),
        (65_535, "uint16"),
        (65_536, "uint32"),
        (2**32 - 1, "uint32"),
    ],
)
def test_dtype_is_the_narrowest_that_leaves_its_maximum_free(codebook_size, dtype):
    level = LevelSpec("codes", codebook_size, (2, 2))
    assert level.dtype == dtype_for(codebook_size) == np.dtype(dtype)
    assert level.fill_value == np.iinfo(dtype).max > codebook_size - 1


@pytest.mark.parametrize("codebook_size", [0, -1, 2**32])
def test_codebook_sizes_that_do_not_fit_are_refused(codebook_size):
    with pytest.raises(CodesError):
        dtype_for(codebook_size)


@pytest.mark.parametrize("grid", [(1,), (7, 7), (64, 64), (256, 300), (16, 64, 64)])
@pytest.mark.parametrize("wanted", [1, 2, 17, 20, 1009, 1024, 4093, 99_991])
def test_rows_per_zarr_shard_are_raised_until_chunks_are_large(grid, wanted):
    finest, coarse = LevelSpec("bottom", 512, grid), LevelSpec("top", 512, (*grid[:-1], 1))
    rows = usable_rows_per_shard([coarse, finest], wanted)
    chunk = finest.rows_per_chunk(rows)
    assert wanted <= rows < wanted + max(1, CHUNK_BYTES // finest.row_bytes)
    assert rows == wanted if chunk == wanted else (chunk + 1) * finest.row_bytes > CHUNK_BYTES / 2
    assert usable_rows_per_shard([coarse, finest], rows) == rows
    if wanted & (wanted - 1) == 0 and grid != (256, 300):
        assert rows == wanted


@pytest.mark.parametrize("grid", [(7, 7), (32, 32), (64, 64), (16, 64, 64), (512, 512)])
def test_chunks_divide_the_zarr_shard_and_stay_below_their_size(grid):
    level = LevelSpec("codes", 512, grid)
    rows_per_shard = default_rows_per_shard([level])
    rows = level.rows_per_chunk(rows_per_shard)
    assert rows_per_shard % rows == 0
    assert rows == 1 or rows * level.row_bytes <= CHUNK_BYTES
    assert rows_per_shard <= MAX_ROWS_PER_SHARD
    assert rows_per_shard == 1 or rows_per_shard * level.row_bytes <= SHARD_BYTES
    assert rows_per_shard & (rows_per_shard - 1) == 0


def test_rows_per_shard_follow_the_coarsest_level():
    top, bottom = LevelSpec("top", 512, (32, 32)), LevelSpec("bottom", 512, (64, 64))
    assert default_rows_per_shard([top, bottom]) == default_rows_per_shard([top]) == 4096
    assert default_rows_per_shard([bottom]) == 2048


@pytest.mark.parametrize(
    "levels",
    [
        (),
        (("a", (2, 2)), ("a", (2, 2))),
        (("samples", (2, 2)),),
        (("quarantine", (2, 2)),),
        (("commits", (2, 2)),),
        (("label", (2, 2)),),
        (("../outside", (2, 2)),),
        (("a/b", (2, 2)),),
        (("", (2, 2)),),
        (("__reserved", (2, 2)),),  # the Zarr v3 specification keeps names that begin with two underscores
        (("a", ()),),
        (("a", (2, 0)),),
        (("a", (1, 2, 3, 4)),),
    ],
)
def test_levels_that_cannot_be_stored_are_refused(levels):
    with pytest.raises(CodesError):
        StoreSpec(tuple(LevelSpec(name, 16, grid) for name, grid in levels), 8, {})


@pytest.mark.parametrize("changes", [{"rows_per_shard": 0}, {"levels": (LevelSpec("a", 0, (2, 2)),)}])
def test_sizes_below_one_are_refused(stores, changes):
    with pytest.raises(CodesError):
        replace(stores.two_levels, **changes)


def test_an_unknown_level_is_answered_with_those_there_are(stores):
    with pytest.raises(CodesError, match=r"'middle'.*top, bottom"):
        stores.two_levels.level("middle")


def test_attributes_survive_json(stores):
    spec = replace(stores.two_levels, segments=(Segment("abc"), Segment("def", 16, 2)), num_rows=21, num_commits=3)
    for complete in (False, True):
        spec = replace(spec, complete=complete)
        text = json.dumps(spec.to_attributes())
        assert StoreSpec.from_attributes(json.loads(text), "here") == spec


def test_settings_are_everything_but_the_progress(stores):
    spec = stores.two_levels
    assert spec.settings() == spec.with_progress(num_rows=5, num_commits=1, complete=True).settings()
    for free in ({"description": "elsewhere"}, {"skipped": {"not an image: .txt": 3}}):
        assert replace(spec, corpus={**spec.corpus, **free}).settings() == spec.settings()
    for change in (
        {"corpus": {**spec.corpus, "num_samples": 25}},
        {"rows_per_shard": 4},
        {"tokenizer": {"fingerprint": "1"}},
        {"preprocessing": {}},
        {"corpus": {}},
        {"segments": (Segment("x"),)},
        {"levels": spec.levels[:1]},
    ):
        assert replace(spec, **change).settings() != spec.settings(), change


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_other_versions_are_refused_by_number(stores, version):
    attributes = stores.two_levels.to_attributes() | {"format_version": version}
    with pytest.raises(CodesError, match=r"here: .*version"):
        StoreSpec.from_attributes(attributes, "here")


WRONG_VALUES = [None, "ab", -1, 1.5, True, [1], [[]], {"a": 1}, {}, "[" * 10, 10**30]


@pytest.mark.parametrize("key", list(StoreSpec((LevelSpec("a", 5, (2, 2)),), 8, {}).to_attributes()))
def test_missing_and_wrong_attributes_are_damaged_metadata(stores, key):
    attributes = replace(stores.two_levels, segments=(Segment("abc"),)).to_attributes()
    without = copy.deepcopy(attributes)
    del without[key]
    with pytest.raises(CodesError):
        StoreSpec.from_attributes(without, "here")
    for value in WRONG_VALUES:
        try:
            StoreSpec.from_attributes(attributes | {key: value}, "here")
        except CodesError:
            continue
        except Exception as error:
            pytest.fail(f"{key}={value!r} raised {type(error).__name__}: {error}")


def test_group_metadata_is_canonical(stores, tmp_path):
    spec = stores.two_levels
    turned = replace(spec, tokenizer=dict(reversed(list(spec.tokenizer.items()))))
    assert group_metadata(spec) == group_metadata(turned)
    (tmp_path / "zarr.json").write_bytes(group_metadata(spec))
    assert read_spec(tmp_path) == spec
