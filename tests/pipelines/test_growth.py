"""Which corpora go on where a store ends, and what is said of the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqmill
from pipelines.cli import app
from pipelines.corpus.plan import FileBundle, ImageFile, InputShard, Plan, TarFile
from pipelines.growth import grows, require_same_job, stages
from vqmill.errors import UsageError
from vqmill.layout import group_metadata, read_spec
from vqmill.spec import LevelSpec, Segment, StoreSpec
from vqmill.verify import verify_store

STORE = Path("codes.zarr")


def run(*words: str | Path) -> int:
    return app([str(word) for word in words])


def tars(*counts: int, classes: Sequence[str] = ()) -> Plan:
    shards = [
        InputShard(index, f"{index}.tar", count, 99, TarFile(f"/{index}.tar")) for index, count in enumerate(counts)
    ]
    return Plan("tars", tuple(shards), tuple(classes), {}, {})


def files(count: int, classes: Sequence[str] = ("ant", "bee")) -> Plan:
    """A folder, planned as plan.py does but for bundles of 4."""
    found = [ImageFile(f"{n:03d}.png", f"{n:03d}", 0, 9) for n in range(count)]
    bundles = [tuple(found[start : start + 4]) for start in range(0, count, 4)]
    shards = [InputShard(n, f"files-{n:06d}", len(b), 9 * len(b), FileBundle("/", b)) for n, b in enumerate(bundles)]
    return Plan("folder", tuple(shards), tuple(classes), {}, {})


def spec_of(plan: Plan, segments: Sequence[Plan] = (), *, complete: bool = True) -> StoreSpec:
    return StoreSpec(
        (LevelSpec("codes", 9, (2, 2)),), 4, {"fingerprint": "f"},
        corpus={"description": plan.corpus, "num_samples": plan.num_samples, "class_names": list(plan.class_names), "skipped": {}},
        segments=tuple(Segment(part.digest, 0, 0, len(part.shards), part.num_samples) for part in (*segments, plan)),
        complete=complete, codec="zstd",
    )  # fmt: skip


def test_a_new_store_and_the_same_corpus_are_one_stage() -> None:
    for plan in (tars(3, 4), files(6)):
        assert stages(None, plan) == [plan]
        for complete in (True, False):
            found = spec_of(plan, complete=complete)
            assert stages(found, plan) == [plan]
            assert not grows(found, plan)
            require_same_job(STORE, found, spec_of(plan), plan)


@pytest.mark.parametrize("complete", [True, False])
def test_longer_tars_are_appended(complete: bool) -> None:
    found, plan = spec_of(tars(3, 4), complete=complete), tars(3, 4, 5)
    assert stages(found, plan) == [plan]
    assert grows(found, plan)
    same = require_same_job(STORE, found, replace(spec_of(plan), codec=None), plan)
    assert (same.segments, same.corpus, same.codec) == (found.segments, found.corpus, None)


def test_a_longer_folder_is_cut_where_the_segments_end() -> None:
    first, plan = files(6), files(15)
    [cut] = stages(spec_of(first), plan)
    assert [shard.num_samples for shard in cut.shards] == [4, 2, 2, 4, 3]
    assert grows(spec_of(first), cut)
    second = files(9).cut_at([6])
    [cut] = stages(spec_of(second, [first]), plan)
    assert [shard.num_samples for shard in cut.shards] == [4, 2, 2, 1, 3, 3]
    assert grows(spec_of(second, [first]), cut)


def test_an_unfinished_store_that_ends_inside_a_bundle_is_finished_first() -> None:
    first, plan = files(6), files(15, ["ant", "bee", "cow"])
    parts = stages(spec_of(first, complete=False), plan)
    assert [[shard.num_samples for shard in part.shards] for part in parts] == [[4, 2], [4, 2, 2, 4, 3]]
    assert parts[0].digest == first.digest
    require_same_job(STORE, spec_of(first), spec_of(parts[0]), parts[0])
    assert not grows(spec_of(first), parts[0])
    assert len(stages(spec_of(files(8), complete=False), plan)) == 1, "no bundle is cut"
    assert len(stages(spec_of(tars(6), complete=False), plan)) == 1, "another corpus: refused later"


@pytest.mark.parametrize(
    ("found", "plan", "message"),
    [
        (tars(3, 4, 5), tars(3, 4), "has more than this corpus: 12 samples, here are 7"),
        (tars(3, 4), tars(3, 5, 9), "begins with the same 7 samples in the same order.*joined with: vqmill merge"),
        (files(6), files(15, ["ant", "cow"]), "Label 1 means 'bee' there"),
        (files(6), files(6, ["ant"]), "Label 1 means 'bee' there"),
    ],
)
def test_other_corpora_are_refused(found: Plan, plan: Plan, message: str) -> None:
    [cut] = stages(spec_of(found), plan)
    assert not grows(spec_of(found), cut)
    with pytest.raises(UsageError, match=r"(?s)exists with other settings:.*there .*, now .*" + message):
        require_same_job(STORE, spec_of(found), spec_of(cut), cut)


def test_a_longer_corpus_does_not_hide_other_settings() -> None:
    plan = tars(3, 4, 5)
    with pytest.raises(UsageError) as caught:
        require_same_job(STORE, spec_of(tars(3, 4)), replace(spec_of(plan), rows_per_shard=8), plan)
    assert "rows_per_shard: there 4, now 8" in str(caught.value)
    assert "plan" not in str(caught.value)


def test_a_store_that_a_prior_drew_is_another() -> None:
    drawn = replace(spec_of(tars(3)), corpus={"sampled": {}}, segments=(Segment("sampled from f", 0, 0, 1, 3),))
    with pytest.raises(UsageError, match=r"(?s)corpus\.sampled.*Choose another --out"):
        require_same_job(STORE, drawn, spec_of(tars(3, 4)), tars(3, 4))


@pytest.mark.usefixtures("ray_session")
def test_a_folder_that_grows_is_appended(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, out = tmp_path / "photos", tmp_path / "codes.zarr"

    def grow(*numbers: int) -> None:
        corpus.mkdir(exist_ok=True)
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(corpus / f"{number:03d}.png")

    command = ("tokenize", corpus, "--tokenizer", tokenizer_folder, "--out", out, "--shard-rows", "8", "--workers", "1")
    grow(*range(20))
    assert run(*command, "--codec", "zstd", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["appended_rows"] == 0
    grow(*range(20, 30))
    assert run(*command, "--codec", "blosc-lz4") == 2
    assert 'codec: there "zstd", now "blosc-lz4"' in capsys.readouterr().err
    assert run(*command, "--dry-run", "--json") == 0
    assert "would append 10 samples to 20 rows" in (printed := capsys.readouterr().out)
    assert json.loads(printed.splitlines()[-1])["appended_samples"] == 10
    # Unfinished, and its plan ends inside the bundle that has grown: that plan is finished first.
    (out / "zarr.json").write_bytes(group_metadata(replace(read_spec(out), complete=False)))
    assert run(*command, "--json") == 0
    printed = capsys.readouterr().out
    assert "appended: 10 rows, behind the 20 of before" in printed
    assert json.loads(printed.splitlines()[-1])["appended_rows"] == 10
    codes = vqmill.open_codes(out)
    assert codes.samples()["input_shard"].to_pylist() == [0] * 20 + [1] * 10
    assert codes.spec.codec == "zstd"
    assert [(part.first_row, part.num_samples) for part in codes.spec.segments] == [(0, 20), (20, 30)]
    assert json.loads((tmp_path / "codes.zarr.run.json").read_bytes())["rows"] == 30
    assert verify_store(out).problems == ()
    assert run(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["appended_rows"] == 0
    assert run("decode", out, "--out", tmp_path / "grid.png", "--rows", "18:24", "--originals", corpus) == 0
    (corpus / "029.png").unlink()
    assert run(*command) == 2
    assert "more than this corpus: 30 samples, here are 29" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_a_limit_takes_the_first_samples_and_a_larger_one_appends(
    scenes: str, tokenizer_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "codes.zarr"
    command = (
        "tokenize",
        scenes,
        "--tokenizer",
        tokenizer_folder,
        "--out",
        store,
        "--workers",
        "1",
        "--shard-rows",
        20,
    )
    assert run(*command, "--limit", 130, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 130
    whole = vqmill.open_codes(reference)
    for number, words, segments in (
        (130, (130,), [130]),
        (130, (130,), [130]),
        (170, (170,), [130, 170]),
        (300, (), [130, 170, 300]),
    ):
        assert run(*command, *(("--limit", *words) if words else ())) == 0
        codes = vqmill.open_codes(store)
        assert [segment.num_samples for segment in codes.spec.segments] == segments
        assert codes.sample_keys() == whole.sample_keys()[:number]
        assert codes.labels.tolist() == whole.labels[:number].tolist()
        assert (codes["bottom"][:] == whole["bottom"][:number]).mean() > 0.99, "batches end elsewhere"
        assert (" (its first 130 samples)" in codes.spec.corpus["description"]) == (number == 130)
        assert verify_store(store).problems == ()
    assert "appended: 130 rows, behind the 170 of before" in capsys.readouterr().out
    assert run(*command, "--limit", 170) == 2
    assert "300 samples, here are 170; name the whole corpus, and no smaller --limit" in capsys.readouterr().err
    assert run(*command, "--limit", 0) == 2
    assert "--limit must be at least 1, got 0" in capsys.readouterr().err
    assert run(*command, "--sample-timeout", 0) == 2
    assert "--sample-timeout must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_originals_of_a_limited_store_are_found_in_the_whole_corpus(
    scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "codes.zarr"
    assert (
        run("tokenize", scenes, "--tokenizer", tokenizer_folder, "--out", store, "--workers", "1", "--limit", 110) == 0
    )
    assert run("decode", store, "--rows", "98:104", "--originals", scenes, "--out", tmp_path / "x.png") == 0
